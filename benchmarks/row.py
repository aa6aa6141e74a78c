"""Decode speed of a folded model with its processor over static min-p in the model itself, in transformers and in vLLM. Writes
benchmarks/row.json. Run: make bench-vllm, or python benchmarks/row.py LIBRARY for one of the two

As in decode.py the two take turns step by step. They share all layers, which are the same bit for bit,
and each has an output matrix of its own; in vLLM they are two engines in one process. Of two engines
that are the same the one that was made first is slower here, its output matrix too, so each order has a
process of its own, and the speed is the geometric mean of both.
"""
import os, sys

os.environ |= dict(VLLM_ENABLE_V1_MULTIPROCESSING='0', VLLM_CPU_KVCACHE_SPACE='1') # one step of an engine is one call

import itertools, json, tempfile, time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np, torch, transformers
from decode import figure, heads_turn, MODEL, SETTINGS, SKIP, speed, STEPS, T, vllm
from run import compared, turns
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from simpledeco.decode import sampling
from simpledeco.files import write_whole
from simpledeco.fold import fold, RowTemperature
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model, sizes

# batch: calls of so many steps; in vLLM in each order
CALLS = dict(transformers={1: 20, 16: 12, 64: 6}, vllm={1: 8, 16: 5, 64: 2})
PROMPT = 'The capital of France is'
FILE = Path(__file__).parent/'row.json'


def folded(source, tmp):
    "A model with a row, in a folder; the head, a random one"
    model = load_model(source)[0]
    head = TemperatureHead(sizes(model)[0], width=0, reads='hidden', base_model=fingerprint(model)).eval()
    head.save_pretrained(tmp/'head')
    return fold(tmp/'head', source, tmp/'folded'), head


class Turns(torch.nn.Module):
    "Two output matrices that take turns, and the clock"
    def __init__(self, ours, theirs):
        super().__init__()
        self.outputs, self.clock = (ours, theirs), []
    def forward(self, hidden):
        self.clock.append(time.perf_counter())
        return self.outputs[not heads_turn(self.clock)](hidden)


def in_transformers(source, made, head, batch, calls):
    (model, tokenizer), ours = load_model(source), load_model(made)[0]
    taking_turns = Turns(ours.get_output_embeddings(), model.get_output_embeddings())
    model.set_output_embeddings(taking_turns)
    processors = RowTemperature(**ours.generation_config.simpledeco), TemperatureLogitsWarper(T)
    process = lambda ids, scores: processors[not heads_turn(taking_turns.clock)](ids, scores)
    ids = tokenizer([PROMPT]*batch, return_tensors='pt').input_ids
    options = sampling(head) | dict(max_new_tokens=SKIP + STEPS + 1, min_new_tokens=SKIP + STEPS + 1, pad_token_id=0,
                                    logits_processor=LogitsProcessorList([process]))
    def generate():
        taking_turns.clock.clear(); model.generate(ids, **options)
        return list(taking_turns.clock)
    return speed(generate, calls, batch)


def engines(folders, order):
    """(engine, settings of a request) of static min-p and of the row, which are made in this order and
    whose layers read the same weights"""
    asked = partial(vllm.SamplingParams, max_tokens=SKIP + STEPS + 1, ignore_eos=True, top_k=0)
    processors = dict(row=['simpledeco.vllm:RowTemperature'], static=None)
    llms = {name: vllm.LLM(str(folders[name]), **SETTINGS, logits_processors=processors[name]) for name in order}
    layers = [llm.apply_model(lambda model: model)[0].model.layers.modules() for llm in llms.values()]
    for first,second in zip(*layers, strict=True):
        # which holds the weights, in the form that this CPU wants
        if hasattr(first, 'cpu_linear'): second.cpu_linear = first.cpu_linear
    return (llms['static'].llm_engine, asked(temperature=T, min_p=.1)), (llms['row'].llm_engine, asked(temperature=1))


def steps(both, batch, calls):
    "Seconds that a step takes [n, 2]; the first call warms up"
    names, pairs = itertools.count(), []
    for _ in range(1 + calls):
        for (engine, params),_ in itertools.product(both, range(batch)): engine.add_request(str(next(names)), PROMPT, params)
        pairs.append(turns(*(lambda _, engine=engine: engine.step() for engine,_ in both), STEPS, warm=SKIP))
        for engine,_ in both:
            while engine.has_unfinished_requests(): engine.step()
    return np.concatenate(pairs[1:])


def in_vllm(folders, order):
    "Seconds of both for every size of the batch"
    both = engines(folders, order)
    return [steps(both, batch, calls) for batch,calls in CALLS['vllm'].items()]


def measure(library, tmp):
    "(batch, figure) for every size of the batch"
    made, head = folded(MODEL, tmp)
    if library == 'transformers':
        for batch,calls in CALLS[library].items(): yield batch, in_transformers(MODEL, made, head, batch, calls)
        return
    with get_context('spawn').Pool(1, maxtasksperchild=1) as pool: # one process after the other
        orders = pool.map(partial(in_vllm, dict(row=made, static=MODEL)), (('static', 'row'), ('row', 'static')), chunksize=1)
    for batch,*pairs in zip(CALLS[library], *orders):
        of_orders = dict(made_second=compared(pairs[0])[0]['ratio'], made_first=compared(pairs[1])[0]['ratio'])
        yield batch, figure(np.sqrt(pairs[0]*pairs[1]), batch) | of_orders


if __name__ == '__main__':
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    for library,module in (('transformers', transformers), ('vllm', vllm)):
        if library not in (sys.argv[1:] or (library,)): continue
        if module is None: sys.exit('row.py: there is no vLLM in this environment: run make bench-vllm')
        results |= {f'{library}_version': module.__version__, f'{library}_load_before': os.getloadavg()[0]}
        with tempfile.TemporaryDirectory() as tmp:
            for batch,found in measure(library, Path(tmp)):
                results[f'135M, {library}, row, batch {batch}'] = found | dict(at_least=.99)
                print(f'{library}, batch {batch}:', '  '.join(f'{k} {round(v, 3)}' for k,v in found.items()), flush=True)
                write_whole(FILE, lambda file: file.write_text(json.dumps(results, indent=1) + '\n'))
