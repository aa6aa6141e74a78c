"""Decode speed with a head over static min-p, in transformers and in vLLM, in one run. Writes benchmarks/decode.json. Run: make bench-vllm

As in run.py the two take turns in the same engine, with the same prompts and counts of tokens, and the ratio is the median of the pairs with its interval. What a head
costs in a step does not depend on the size of the model, so a larger one is measured beside the paper's: of the shape of SmolLM2 360M, with random weights.
"""
import json, os, sys, tempfile
from pathlib import Path

import torch, transformers, vllm
from run import ROOT, compared, decode, turns

from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model
from simpledeco.vllm import serve_dir

MODEL, LARGER = ROOT/'models/embedded', dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5)
READS, NEW, T = ('logits', 'hidden'), 8, .7
SETTINGS = dict(dtype='float32', max_model_len=512, max_num_seqs=64, enforce_eager=True)
# nobind: vLLM would bind all three engines to the same core
os.environ |= dict(HF_HUB_OFFLINE='1', VLLM_CPU_KVCACHE_SPACE='1', VLLM_CPU_OMP_THREADS_BIND='nobind', VLLM_NO_USAGE_STATS='1')


def larger(folder):
    "A model of LARGER's shape, in a folder"
    torch.manual_seed(0)
    model, tokenizer = load_model(MODEL)
    for part in (transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_dict() | LARGER)), tokenizer): part.save_pretrained(folder)
    return folder


def in_vllm(static, ours, batch, rounds):
    "`decode` of run.py, for two engines of vLLM"
    params = {t: vllm.SamplingParams(temperature=t, min_p=.1, top_k=0, max_tokens=NEW, ignore_eos=True) for t in (1, T)}
    generate = lambda llm, t: llm.generate(['The capital of France is']*batch, params[t], use_tqdm=False)
    speed, s, o = compared(turns(lambda i: generate(static, T), lambda i: generate(ours, 1), rounds))
    return speed | dict(head_tokens_per_second=batch*NEW*rounds/o, static_tokens_per_second=batch*NEW*rounds/s)


def measure(folder, batches, rounds, tmp):
    "(name, result) for both libraries, both kinds of head and every size of the batch"
    model, tokenizer = load_model(folder)
    for batch in batches:
        for r in READS: yield f'transformers, {r}, batch {batch}', decode(model, tokenizer, r, batch, NEW, rounds, T)
    for r in READS:
        TemperatureHead(model.config.hidden_size, reads=r, base_model=fingerprint(model)).save_pretrained(tmp/f'head-{r}')
        serve_dir(tmp/f'head-{r}', folder, tmp/r)
    del model
    static, *heads = (vllm.LLM(str(x), **SETTINGS) for x in (folder, *(tmp/r for r in READS)))
    for batch in batches:
        for r,ours in zip(READS, heads): yield f'vllm, {r}, batch {batch}', in_vllm(static, ours, batch, rounds)


if __name__ == '__main__':
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    results = dict(threads=torch.get_num_threads(), cores=os.cpu_count(), load_before=os.getloadavg()[0], transformers_version=transformers.__version__, vllm_version=vllm.__version__, new=NEW, temperature=T)
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        for size,make,batches in (('135M', lambda: MODEL, (1, 16, 64)), ('360M', lambda: larger(tmp/'larger'), (16,))):
            (tmp/size).mkdir()
            for name,result in measure(make(), batches, rounds, tmp/size):
                results[f'{size}, {name}'] = result
                print(f'{size}, {name:<33} ' + '  '.join(f'{k} {round(v, 3)}' for k,v in result.items()), flush=True)
                (Path(__file__).parent/'decode.json').write_text(json.dumps(results, indent=1) + '\n')
