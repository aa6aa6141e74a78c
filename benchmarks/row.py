"""Decode speed of a folded model with its processor over static min-p in the model itself, in transformers and in vLLM. Writes
benchmarks/row.json. Run: make bench-vllm, or python benchmarks/row.py LIBRARY for one of the two

As in decode.py the two take turns step by step. In transformers they share all layers, which are the same bit for bit, and each has
an output matrix of its own; in vLLM they are two engines in one process.
"""
import os, sys

os.environ['VLLM_ENABLE_V1_MULTIPROCESSING'] = '0' # one step of an engine is one call

import itertools, json, tempfile, time
from functools import partial
from pathlib import Path

import numpy as np, torch, transformers
from decode import figure, heads_turn, MODEL, SETTINGS, SKIP, speed, STEPS, T, vllm
from run import turns
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from simpledeco.decode import sampling
from simpledeco.files import write_whole
from simpledeco.fold import fold, RowTemperature
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model, sizes

CALLS = {1: 20, 16: 12, 64: 6} # batch: calls of so many steps
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


def engines(source, made):
    "(engine, settings of a request) of static min-p and of the row"
    asked = partial(vllm.SamplingParams, max_tokens=SKIP + STEPS + 1, ignore_eos=True, top_k=0)
    row = vllm.LLM(str(made), **SETTINGS, logits_processors=['simpledeco.vllm:RowTemperature'])
    return (vllm.LLM(str(source), **SETTINGS).llm_engine, asked(temperature=T, min_p=.1)), (row.llm_engine, asked(temperature=1))


def in_vllm(both, batch, calls):
    names, pairs = itertools.count(), []
    for _ in range(1 + calls):
        for (engine, params),_ in itertools.product(both, range(batch)): engine.add_request(str(next(names)), PROMPT, params)
        pairs.append(turns(*(lambda _, engine=engine: engine.step() for engine,_ in both), STEPS, warm=SKIP))
        for engine,_ in both:
            while engine.has_unfinished_requests(): engine.step()
    return figure(np.concatenate(pairs[1:]), batch) # the first call warms up


def measure(library, tmp):
    "(batch, figure) for every size of the batch"
    made, head = folded(MODEL, tmp)
    if library == 'vllm':
        both = engines(MODEL, made)
        return ((batch, in_vllm(both, batch, calls)) for batch,calls in CALLS.items())
    return ((batch, in_transformers(MODEL, made, head, batch, calls)) for batch,calls in CALLS.items())


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
