"""Decode speed with a head over static min-p, in transformers and in vLLM, in one run. Writes benchmarks/decode.json. Run: make bench-vllm

As in run.py the two take turns with the same prompts and counts of tokens, and the ratio is the median of the pairs with its interval. In vLLM they even take turns in one
engine, which has its head or not: two engines differ by more than a head costs. What a head costs in a step does not depend on the size of the model, so a larger one is
measured beside the paper's: of the shape of SmolLM2 360M, with random weights.
A machine that others share can have intervals wider than the cost: a head on hidden states, which costs next to nothing, tells by how much.
"""
import json, os, sys, tempfile
from functools import partial
from pathlib import Path

import torch, transformers, vllm
from run import ROOT, compared, decode, turns

from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model
from simpledeco.vllm import serve_dir

MODEL, LARGER = ROOT/'models/embedded', dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5)
NEW, T = 16, .7 # tokens of an answer; the static temperature
SETTINGS = dict(dtype='float32', max_model_len=512, max_num_seqs=64, enforce_eager=True)
# nobind: on both cores; insecure: `switch` is sent to vLLM's process
os.environ |= dict(HF_HUB_OFFLINE='1', VLLM_CPU_KVCACHE_SPACE='1', VLLM_CPU_OMP_THREADS_BIND='nobind', VLLM_NO_USAGE_STATS='1', VLLM_ALLOW_INSECURE_SERIALIZATION='1')


def larger(folder):
    "A model of LARGER's shape, in a folder"
    torch.manual_seed(0)
    model, tokenizer = load_model(MODEL)
    for part in (transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_dict() | LARGER)), tokenizer): part.save_pretrained(folder)
    return folder


def switch(model, on):
    "vLLM's own class, or the one with a head"
    from simpledeco.vllm import with_head
    base = next(c for c in type(model).__mro__ if c.__name__ == 'LlamaForCausalLM')
    model.__class__ = with_head(base) if on else base


def in_vllm(llm, batch, rounds):
    "`decode` of run.py, in an engine of vLLM"
    def generate(on):
        llm.apply_model(partial(switch, on=on))
        params = vllm.SamplingParams(temperature=1 if on else T, min_p=.1, top_k=0, max_tokens=NEW, ignore_eos=True)
        llm.generate(['The capital of France is']*batch, params, use_tqdm=False)
    speed, s, o = compared(turns(lambda i: generate(False), lambda i: generate(True), rounds))
    return speed | dict(head_tokens_per_second=batch*NEW*rounds/o, static_tokens_per_second=batch*NEW*rounds/s)


def measure(folder, reads, batches, rounds, tmp):
    "(name, result) for both libraries, and in vLLM for every size of the batch"
    model, tokenizer = load_model(folder)
    yield f'transformers, {reads}, batch 16', decode(model, tokenizer, reads, 16, NEW, rounds, T)
    TemperatureHead(model.config.hidden_size, reads=reads, base_model=fingerprint(model)).save_pretrained(tmp/'head')
    del model
    llm = vllm.LLM(str(serve_dir(tmp/'head', folder, tmp/'served')), **SETTINGS)
    for batch in batches: yield f'vllm, {reads}, batch {batch}', in_vllm(llm, batch, rounds)


if __name__ == '__main__':
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    results = dict(threads=torch.get_num_threads(), cores=os.cpu_count(), load_before=os.getloadavg()[0], transformers_version=transformers.__version__, vllm_version=vllm.__version__, new=NEW, temperature=T)
    for size,batches in (('135M', (1, 16, 64)), ('360M', (16,))):
        for reads in ('logits', 'hidden'):
            with tempfile.TemporaryDirectory() as folder:
                tmp = Path(folder)
                for name,result in measure(MODEL if size == '135M' else larger(tmp/'model'), reads, batches, rounds, tmp):
                    results[f'{size}, {name}'] = result
                    print(f'{size}, {name:<33} ' + '  '.join(f'{k} {round(v, 3)}' for k,v in result.items()), flush=True)
                    (Path(__file__).parent/'decode.json').write_text(json.dumps(results, indent=1) + '\n')
