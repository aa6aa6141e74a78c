"""Decode speed with a head over static min-p, in transformers and in vLLM, in one run. Writes
benchmarks/decode.json. Run: make bench-vllm. Without vLLM, run.py measures the part in transformers.

A head costs a millisecond or two of a step, and a machine that others share strays by more. So the
head and the static temperature take turns step by step in one model, H S S H, and the ratio is the
median of the pairs of neighbours, with a 95% interval that resamples them. What a head costs in a
step does not depend on the size of the model, so a larger one is measured beside the paper's: of
the shape of SmolLM2 360M, with random weights.
"""
import json, os, sys, tempfile, time
from functools import partial
from pathlib import Path

import numpy as np
import torch, transformers
from run import ROOT, compared
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from simpledeco.decode import attach, sampling
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model, sizes
from simpledeco.vllm import serve_dir

try: import vllm
except ModuleNotFoundError: vllm = None # it wants an environment of its own

MODEL = ROOT/'models/embedded'
LARGER = dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
              num_key_value_heads=5)
# the static temperature; steps of a call before the first that counts, and how many count: both
# are multiples of four
T, SKIP, STEPS = .7, 4, 60
SETTINGS = dict(dtype='float32', max_model_len=512, max_num_seqs=64, enforce_eager=True)
# nobind: on both cores; insecure: `watch` is sent to vLLM's process
os.environ |= dict(HF_HUB_OFFLINE='1', VLLM_CPU_KVCACHE_SPACE='1', VLLM_CPU_OMP_THREADS_BIND='nobind',
                   VLLM_NO_USAGE_STATS='1', VLLM_ALLOW_INSECURE_SERIALIZATION='1')


def larger(folder):
    "A model of LARGER's shape, in a folder"
    torch.manual_seed(0)
    model, tokenizer = load_model(MODEL)
    config = transformers.LlamaConfig(**model.config.to_dict() | LARGER)
    for part in (transformers.LlamaForCausalLM(config), tokenizer): part.save_pretrained(folder)
    return folder


def heads_turn(clock):
    "Whether the step that `clock` saw begin is one with the head: H S S H"
    return len(clock) % 4 in (0, 1)


def speed(generate, calls, batch):
    """Call `generate`, which gives the clock at each of its steps, and compare neighbours; the
    first call warms up"""
    steps = np.stack([np.diff(generate())[SKIP:SKIP + STEPS]
                      for _ in range(calls + 1)])[1:].reshape(-1, 4)
    return figure(np.concatenate([steps[:, [1, 0]], steps[:, [2, 3]]]), batch)


def figure(pairs, batch):
    "Speed of the head over the static temperature, of the seconds that steps of both took [n, 2], the static one first"
    static, head = np.median(pairs, 0)
    return compared(pairs)[0] | dict(at_least=.985, head_milliseconds=1000*head, static_milliseconds=1000*static,
                                     cost_milliseconds=1000*np.median(pairs[:, 1] - pairs[:, 0]),
                                     head_tokens_per_second=batch/head)


def in_transformers(model, tokenizer, head, batch, calls):
    ids = tokenizer(['The capital of France is']*batch, return_tensors='pt').input_ids
    clock = []
    static = TemperatureLogitsWarper(T)
    attachment = attach(model, head)
    attachment.remove() # it is called by hand, at every second step
    def hook(module, args, logits):
        clock.append(time.perf_counter())
        return attachment(module, args, logits) if heads_turn(clock) else logits
    options = sampling(head) | dict(max_new_tokens=SKIP + STEPS + 1,
                                    min_new_tokens=SKIP + STEPS + 1, pad_token_id=0)
    options['logits_processor'] = LogitsProcessorList([lambda ids, scores: scores
                                                       if heads_turn(clock) else static(ids, scores)])
    def generate():
        clock.clear(); model.generate(ids, **options)
        return list(clock)
    handle = model.get_output_embeddings().register_forward_hook(hook)
    try: return speed(generate, calls, batch)
    finally: handle.remove()


def watch(model):
    "In vLLM's process: the head at every second step, and the clock at each"
    headed, ours, base = type(model).__mro__[:3] # a head goes in front of vLLM's own class
    assert ours.__name__ == 'WithHead', headed
    class Alternating(headed):
        def compute_logits(self, *args, **kwargs):
            self.clock.append(time.perf_counter())
            return (headed if heads_turn(self.clock) else base).compute_logits(self, *args, **kwargs)
    model.clock, model.__class__ = [], Alternating


def read(model):
    "In vLLM's process: the clock, which starts again"
    clock, model.clock = model.clock, []
    return clock


def in_vllm(llm, batch, calls):
    # a temperature of 1 or of .7 is the same work
    params = vllm.SamplingParams(temperature=1, min_p=.1, top_k=0, max_tokens=SKIP + STEPS + 1,
                                 ignore_eos=True)
    def generate():
        llm.generate(['The capital of France is']*batch, params, use_tqdm=False)
        return llm.apply_model(partial(read))[0]
    return speed(generate, calls, batch)


def measure(folder, reads, calls, tmp):
    "(name, result) for both libraries, and in vLLM for every size of the batch"
    model, tokenizer = load_model(folder)
    head = TemperatureHead(sizes(model)[0], reads=reads, base_model=fingerprint(model)).eval()
    yield f'transformers, {reads}, batch 16', in_transformers(model, tokenizer, head, 16, calls[16])
    head.save_pretrained(tmp/'head')
    del model
    llm = vllm.LLM(str(serve_dir(tmp/'head', folder, tmp/'served')), **SETTINGS)
    llm.apply_model(partial(watch))
    for batch,n in calls.items(): yield f'vllm, {reads}, batch {batch}', in_vllm(llm, batch, n)


if __name__ == '__main__':
    if vllm is None: sys.exit('decode.py: there is no vLLM in this environment: run make bench-vllm')
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1 # of the calls, for a quick look
    results = dict(threads=torch.get_num_threads(), cores=os.cpu_count(),
                   load_before=os.getloadavg()[0], transformers_version=transformers.__version__,
                   vllm_version=vllm.__version__, steps=STEPS, temperature=T)
    for size,calls in (('135M', {1: 24, 16: 16, 64: 8}), ('360M', {1: 10, 16: 10})):
        for reads in ('logits', 'hidden'):
            with tempfile.TemporaryDirectory() as folder:
                tmp = Path(folder)
                for name,result in measure(MODEL if size == '135M' else larger(tmp/'model'), reads,
                                           {b: max(1, int(share*n)) for b,n in calls.items()}, tmp):
                    results[f'{size}, {name}'] = result
                    print(f'{size}, {name:<33} '
                          + '  '.join(f'{k} {round(v, 3)}' for k,v in result.items()), flush=True)
                    (Path(__file__).parent/'decode.json').write_text(
                        json.dumps(results, indent=1) + '\n')
