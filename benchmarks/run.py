"""Speed and memory, as ratios measured side by side in one run. Prints a table and writes
benchmarks/results.json. Run: make bench

Whatever is compared takes turns, call by call, so that a busy machine slows both; the ratio is the
median of the pairs, with a 95% interval that resamples them.
"""
import copy, json, os, subprocess, sys, time
from pathlib import Path

import numpy as np
import torch
from transformers import MinPLogitsWarper

from simpledeco.conversations import encode
from simpledeco.study.data import load_examples
from simpledeco.decode import attach, min_p_filter, sampling
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model
from simpledeco.study.models import build_model
from simpledeco.scan import _batches, _scan_batch
from simpledeco.study.settings import load_profile, project_root

ROOT, DVC = project_root(Path(__file__).parent), Path(sys.executable).parent/'dvc'


def turns(first, second, rounds, warm=1, clock=time.perf_counter):
    """Seconds that two functions take [rounds, 2], alternating, now one first and now the other;
    each is called with the number of the round"""
    pairs = np.zeros((rounds, 2))
    for i in range(-warm, rounds):
        for k in ((0, 1) if i % 2 else (1, 0)):
            start = clock(); (first, second)[k](max(i, 0))
            if i >= 0: pairs[i, k] = clock() - start
    return pairs


def compared(pairs, bootstrap=1000):
    """Speed of the second over that of the first: median of the pairs, its 95% interval, and the
    seconds of both"""
    ratio, generator = pairs[:, 0]/pairs[:, 1], np.random.default_rng(0)
    lo, hi = np.quantile(np.median(ratio[generator.integers(len(ratio), size=(bootstrap, len(ratio)))],
                                   1), (.025, .975))
    return dict(ratio=float(np.median(ratio)), lo=float(lo), hi=float(hi),
                pairs=len(ratio)), *pairs.sum(0).tolist()


@torch.inference_mode()
def bare(model, encoded):
    "Hidden states and output embedding on the same batch: what no scan can avoid"
    width = max(len(ids) for ids,_ in encoded)
    ids, mask = torch.zeros(2, len(encoded), width, dtype=torch.long)
    for row,(tokens,_) in enumerate(encoded):
        ids[row, :len(tokens)] = torch.tensor(tokens); mask[row, :len(tokens)] = 1
    r = torch.tensor([row for row,(_,where) in enumerate(encoded) for _ in where])
    c = torch.tensor([i for _,where in encoded for i in where])
    return model.get_output_embeddings()(
        model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[r, c-1])


def prescan(model, tokenizer, profile):
    encoded = [encode(x, tokenizer, 8192) for x in load_examples(ROOT, 3)][:profile.shard_examples]
    batches = [[encoded[i] for i in b] for b in _batches(encoded, profile.batch_tokens)]
    plain = lambda i: bare(model, batches[i])
    ours = lambda i: _scan_batch(model, batches[i], range(len(batches[i])))
    speed, forward, scan = compared(turns(plain, ours, len(batches)))
    tokens = sum(len(ids) for ids,_ in encoded)
    padded = sum(len(b)*max(len(ids) for ids,_ in b) for b in batches)
    return speed | dict(bare_tokens_per_second=tokens/forward, scan_tokens_per_second=tokens/scan,
                        share_of_padding=1 - tokens/padded, tokens=tokens,
                        response_tokens=sum(len(w) for _,w in encoded))


MEMORY = '''
import json, resource, sys, tempfile, torch
from pathlib import Path
from simpledeco.study.data import load_examples
from simpledeco.model import load_model
from simpledeco.scan import scan
torch.set_num_threads(1)
root, copies = Path(sys.argv[1]), int(sys.argv[2])
model, tokenizer = load_model(root/'models/smoke')
examples = [dict(x, id=f"{k}-{x['id']}", group=f"{k}-{x['group']}")
            for k in range(copies) for x in load_examples(root, 4)]
with tempfile.TemporaryDirectory() as tmp: table = scan(model, tokenizer, examples, tmp, progress=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
print(json.dumps(dict(conversations=len(examples), tokens=table.info['tokens'], peak_megabytes=peak)))
'''


def memory():
    smoke = load_profile('smoke', ROOT)
    build_model(smoke.model, ROOT/'models/smoke', smoke.sha256)
    sizes = [json.loads(subprocess.run([sys.executable, '-c', MEMORY, ROOT, str(n)],
                                       cwd=ROOT, check=True, capture_output=True,
                                       text=True).stdout.splitlines()[-1]) for n in (1, 4)]
    return dict(ratio=sizes[1]['peak_megabytes']/sizes[0]['peak_megabytes'],
                corpus_ratio=sizes[1]['tokens']/sizes[0]['tokens'], sizes=sizes)


def sampler(vocabulary, batch=16, rounds=20):
    scores = 3*torch.randn(batch, vocabulary)
    theirs = MinPLogitsWarper(min_p=.1)
    ours = lambda ids, z: min_p_filter(z, .1)
    assert torch.equal(theirs(None, scores.clone()), ours(None, scores.clone()))
    speed, t, o = compared(turns(lambda i: theirs(None, scores), lambda i: ours(None, scores), rounds))
    return speed | dict(vocabulary=vocabulary, ours_milliseconds=1000*o/rounds,
                        theirs_milliseconds=1000*t/rounds)


def decode(model, tokenizer, reads, batch=16, new=8, rounds=40, temperature=.7):
    "The same engine and the same min-p filter, with a head and with a static temperature"
    head = TemperatureHead(model.config.hidden_size, reads=reads, base_model=fingerprint(model)).eval()
    ids = tokenizer(['The capital of France is']*batch, return_tensors='pt').input_ids
    options = dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, do_sample=True, top_k=0)

    # both in memory of the same kind: the weights of `model` are mapped from a file
    theirs, mine = copy.deepcopy(model), copy.deepcopy(model)
    attach(mine, head) # once, as a user would: attaching checks the model with a forward pass
    static = lambda i: theirs.generate(ids, temperature=temperature, min_p=.1, **options)
    ours = lambda i: mine.generate(ids, **(options | sampling(head)))
    speed, s, o = compared(turns(static, ours, rounds))
    return speed | dict(head_tokens_per_second=batch*new*rounds/o,
                        static_tokens_per_second=batch*new*rounds/s)


def over_vocabularies():
    "Ours against AutoDeco, over the size of the vocabulary"
    from cost import training # decode.py imports this file where the packages of cost.py are missing
    rows = training((1024, 8192, 49152, 151936), 2)
    return {f"ratio at V = {r['vocabulary']:,}": r['ratio'] for r in rows} | dict(rows=rows)


def dvc():
    "`dvc repro` when there is nothing to do; None where there is something to do"
    if subprocess.run([DVC, 'status', '--quiet'], cwd=ROOT).returncode:
        return dict(seconds=None, why='the pipeline is not up to date: run dvc repro')
    start = time.perf_counter(); subprocess.run([DVC, 'repro', '--quiet'], cwd=ROOT, check=True)
    return dict(seconds=time.perf_counter() - start)


if __name__ == '__main__':
    torch.manual_seed(0)
    p = load_profile('embedded', ROOT)
    model, tokenizer = load_model(build_model(p.model, ROOT/'models/embedded', p.sha256))
    parts = {'pre-scan / bare forward': lambda: prescan(model, tokenizer, p),
             'peak memory, corpus x 4': memory,
             'min-p filter / transformers, V = 49,152': lambda: sampler(49152),
             'min-p filter / transformers, V = 151,936': lambda: sampler(151936),
             'decoding, head on logits / static': lambda: decode(model, tokenizer, 'logits'),
             'decoding, head on hidden / static': lambda: decode(model, tokenizer, 'hidden'),
             'warm dvc repro': dvc, 'training tokens/s, ours / AutoDeco': over_vocabularies}
    results = dict(threads=torch.get_num_threads(), load_before=os.getloadavg()[0])
    for name,part in parts.items():
        results[name] = part()
        shown = {k: round(v, 3) for k,v in results[name].items() if isinstance(v, (int, float))}
        print(f'{name:<42} ' + '  '.join(f'{k} {v:,}' for k,v in shown.items()), flush=True)
    (Path(__file__).parent/'results.json').write_text(json.dumps(results, indent=1) + '\n')
