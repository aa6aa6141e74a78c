"""Speed as ratios, measured side by side in one run. Writes benchmarks/results.json.
Run: make bench, or python benchmarks/run.py

Whatever is compared takes turns, call by call, so that a busy machine slows both; the ratio is the
median of the pairs, with a 95% interval that resamples them.
"""
import json, os, subprocess, sys, time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import MinPLogitsWarper

from simpledeco.conversations import encode, end_tokens
from simpledeco.study.data import load_examples
from simpledeco.decode import min_p_filter
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model, sizes
from simpledeco.study.models import build_model
from simpledeco.scan import _batches, _scan_batch
from simpledeco.study.settings import load_profile, project_root

ROOT, DVC = project_root(Path(__file__).parent), Path(sys.executable).parent/'dvc'
VOCABULARIES = 49152, 151936


def commit():
    "The commit of the project; None where there is no git"
    ask = ['git', 'rev-parse', 'HEAD']
    try: return subprocess.run(ask, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError: return None


def turns(first, second, rounds, warm=1, clock=time.perf_counter):
    """Seconds that two functions take [rounds, 2], alternating, now one first and now the other;
    each is called with the number of the round"""
    pairs = np.zeros((rounds, 2))
    for i in range(-warm, rounds):
        for k in ((0, 1) if i % 2 else (1, 0)):
            start = clock(); (first, second)[k](max(i, 0))
            if i >= 0: pairs[i, k] = clock() - start
    return pairs


def middle(values, bootstrap=1000):
    "The median of some numbers and its 95% interval, which resamples them"
    generator = np.random.default_rng(0)
    drawn = values[generator.integers(len(values), size=(bootstrap, len(values)))]
    return [float(x) for x in (np.median(values), *np.quantile(np.median(drawn, 1), (.025, .975)))]


def compared(pairs):
    """Speed of the second over that of the first: median of the pairs, its 95% interval, and the
    seconds of both"""
    ratio, lo, hi = middle(pairs[:, 0]/pairs[:, 1])
    return dict(ratio=ratio, lo=lo, hi=hi, pairs=len(pairs)), *pairs.sum(0).tolist()


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
    ends = end_tokens(model, tokenizer)
    encoded = [encode(x, tokenizer, 8192, ends) for x in load_examples(ROOT, 3)][:profile.shard_examples]
    batches = [[encoded[i] for i in b] for b in _batches(encoded, profile.batch_tokens)]
    plain = lambda i: bare(model, batches[i])
    ours = lambda i: _scan_batch(model, batches[i], range(len(batches[i])))
    speed, forward, scan = compared(turns(plain, ours, len(batches)))
    tokens = sum(len(ids) for ids,_ in encoded)
    padded = sum(len(b)*max(len(ids) for ids,_ in b) for b in batches)
    return speed | dict(at_least=.9, bare_tokens_per_second=tokens/forward, scan_tokens_per_second=tokens/scan,
                        share_of_padding=1 - tokens/padded, tokens=tokens,
                        response_tokens=sum(len(w) for _,w in encoded))


def sampler(vocabulary, batch=16, rounds=20):
    scores = 3*torch.randn(batch, vocabulary)
    theirs = MinPLogitsWarper(min_p=.1)
    ours = lambda ids, z: min_p_filter(z, .1)
    assert torch.equal(theirs(None, scores.clone()), ours(None, scores.clone()))
    speed, t, o = compared(turns(lambda i: theirs(None, scores), lambda i: ours(None, scores), rounds))
    return speed | dict(at_least=1, vocabulary=vocabulary, ours_milliseconds=1000*o/rounds,
                        theirs_milliseconds=1000*t/rounds)


def decoding(model, tokenizer, reads, calls=6):
    "Steps of `generate` with a head over those with a static temperature and the same min-p"
    from decode import in_transformers # it imports this file
    head = TemperatureHead(sizes(model)[0], reads=reads, base_model=fingerprint(model)).eval()
    return in_transformers(model, tokenizer, head, 16, calls)


def training(vocabulary, rounds=8, steps=100):
    "Tokens a second of our steps over those of AutoDeco's, which is given the logits"
    from cost import autodeco, ours # decode.py imports this file where the packages of cost.py are missing
    (theirs, few), (mine, many) = autodeco(vocabulary), ours('logits')
    pairs = turns(lambda i: theirs(), lambda i: [mine() for _ in range(steps)], rounds)/[few, steps*many]
    speed, t, o = compared(pairs) # seconds a token
    return speed | dict(at_least=1000, vocabulary=vocabulary, ours_tokens_per_second=rounds/o, theirs_tokens_per_second=rounds/t)


def dvc(rounds=5):
    "`dvc repro` where there is nothing to do, against `dvc status`, which is what it cannot avoid"
    call = lambda *command: subprocess.run([DVC, *command, '--quiet'], cwd=ROOT)
    if call('status').returncode: return dict(why='the pipeline is not up to date: run dvc repro')
    speed, _, seconds = compared(turns(lambda i: call('status'), lambda i: call('repro').check_returncode(), rounds))
    return speed | dict(at_least=.8, seconds=seconds/rounds)


def parts():
    "{name: function}, the most wanted first"
    p = load_profile('embedded', ROOT)
    model, tokenizer = load_model(build_model(p.model, ROOT/'models/embedded', p.sha256))
    scans = {'pre-scan / bare forward': partial(prescan, model, tokenizer, p)}
    filters = {f'min-p filter / transformers, V = {v:,}': partial(sampler, v) for v in VOCABULARIES}
    steps = {f'decoding in transformers, head on {r} / static': partial(decoding, model, tokenizer, r) for r in ('logits', 'hidden')}
    heads = {f'training tokens/s, ours / AutoDeco, V = {v:,}': partial(training, v) for v in VOCABULARIES}
    return scans | filters | steps | heads | {'warm dvc repro / dvc status': dvc}


if __name__ == '__main__':
    torch.manual_seed(0)
    results = dict(threads=torch.get_num_threads(), load_before=os.getloadavg()[0])
    for name,part in parts().items():
        results[name] = part()
        print(name, results[name], file=sys.stderr, flush=True)
        (Path(__file__).parent/'results.json').write_text(json.dumps(results, indent=1) + '\n')
