"""Decode speed with a head over static min-p, in transformers and in vLLM, in one run. Writes benchmarks/decode.json. Run: make bench-vllm

As in run.py the two take turns in the same engine, with the same prompts and counts of tokens, and the ratio is the median of the pairs with its interval.
"""
import json, os, sys, tempfile
from pathlib import Path

import torch, transformers, vllm
from run import ROOT, compared, decode, turns

from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model
from simpledeco.vllm import serve_dir

MODEL, READS, SIZE = ROOT/'models/embedded', ('logits', 'hidden'), dict(batch=16, new=8, rounds=40)
SETTINGS = dict(dtype='float32', max_model_len=512, max_num_seqs=16, enforce_eager=True)
# nobind: vLLM would bind all three engines to the same core
os.environ |= dict(HF_HUB_OFFLINE='1', VLLM_CPU_KVCACHE_SPACE='1', VLLM_CPU_OMP_THREADS_BIND='nobind', VLLM_NO_USAGE_STATS='1')


def engine(folder): return vllm.LLM(str(folder), **SETTINGS)


def in_vllm(static, ours, batch, new, rounds):
    "`decode` of run.py, for two engines of vLLM"
    params = vllm.SamplingParams(temperature=1, min_p=.1, top_k=0, max_tokens=new, ignore_eos=True)
    generate = lambda llm: llm.generate(['The capital of France is']*batch, params, use_tqdm=False)
    speed, s, o = compared(turns(lambda i: generate(static), lambda i: generate(ours), rounds))
    return speed | dict(head_tokens_per_second=batch*new*rounds/o, static_tokens_per_second=batch*new*rounds/s)


if __name__ == '__main__':
    if len(sys.argv) > 1: SIZE['rounds'] = int(sys.argv[1])
    model, tokenizer = load_model(MODEL)
    results = dict(threads=torch.get_num_threads(), cores=os.cpu_count(), load_before=os.getloadavg()[0], transformers_version=transformers.__version__, vllm_version=vllm.__version__, **SIZE)
    parts = {f'transformers, {r}': lambda r=r: decode(model, tokenizer, r, **SIZE) for r in READS}
    with tempfile.TemporaryDirectory() as tmp:
        for r in READS:
            TemperatureHead(model.config.hidden_size, reads=r, base_model=fingerprint(model)).save_pretrained(Path(tmp)/f'head-{r}')
            serve_dir(Path(tmp)/f'head-{r}', MODEL, Path(tmp)/r)
        static, ours = engine(MODEL), {r: engine(Path(tmp)/r) for r in READS}
        parts |= {f'vllm, {r}': lambda r=r: in_vllm(static, ours[r], **SIZE) for r in READS}
        for name,part in parts.items():
            results[name] = part()
            print(f'{name:<22} ' + '  '.join(f'{k} {round(v, 3)}' for k,v in results[name].items()), flush=True)
            (Path(__file__).parent/'decode.json').write_text(json.dumps(results, indent=1) + '\n')
