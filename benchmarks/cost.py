"""What each method costs: training speed and memory over the size of the vocabulary, parameters,
decoding overhead, and the wall-clock with the pre-scan, in one run.

A training step is forward, backward and optimiser on the same number of tokens with random inputs.
AutoDeco's step has both heads and both losses, with its full sort of the vocabulary; the logits are
given to it for free. Ours reads cached features and gaps. Every configuration runs in a process of
its own, so that its peak memory is its own. Decoding is measured on the profile's model, methods
taking turns. Writes cost.json and cost.csv in the results of the profile.
Run: python benchmarks/cost.py [profile]
"""
import json, resource, statistics, sys, tempfile, time
from multiprocessing import get_context

import pandas as pd
import torch

from simpledeco.study.autodeco import AutoDeco, temperature_loss, top_p_loss
from simpledeco.study.data import load_examples
from simpledeco.decode import min_p_filter, top_p_filter
from simpledeco.head import TemperatureHead
from simpledeco.loss import minimum_sufficient_hinge
from simpledeco.model import load_model
from simpledeco.scan import scan
from simpledeco.study.results import save_results
from simpledeco.study.settings import load_params, load_profile

HIDDEN = 576
SETTINGS = {
    'AutoDeco': dict(objective=['steepness of the soft mask', 'rate of easy-token masking',
                                'dynamic fine-tuning weights', 'weight of either loss',
                                'clamp of T in the first loss', 'clamp of T in the second',
                                'epsilon of the normaliser', 'epsilon of the logarithm'],
                     heads=['width', 'range of T', 'statistics that the second head reads',
                            'detachment between the heads'], data=['own correct answers only'],
                     optimiser=['learning rate', 'steps', 'batch', 'schedule', 'gradient clipping']),
    'ours': dict(objective=['risk', 'min-p'], heads=['width', 'inputs', 'smallest T', 'largest T'],
                 optimiser=['learning rate', 'steps', 'batch', 'schedule'],
                 data=['probability from which a token is trivial', 'share of trivial tokens kept',
                       'largest rank kept', 'share of each bucket in a batch'])}


def ours(reads, tokens=1024):
    head = TemperatureHead(HIDDEN, reads=reads)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3)
    x, gap = torch.randn(tokens, len(head.mean)), 5*torch.rand(tokens)

    def step():
        loss = minimum_sufficient_hinge(head(x), gap)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return step, tokens


def autodeco(vocabulary, tokens=64):
    heads = AutoDeco(HIDDEN)
    optimizer = torch.optim.AdamW(heads.parameters(), 5e-6)
    hidden, logits = torch.randn(1, tokens + 1, HIDDEN), 3*torch.randn(1, tokens + 1, vocabulary)
    labels = torch.randint(vocabulary, (1, tokens + 1))

    def step():
        T, P = heads(hidden, logits)
        loss = temperature_loss(logits, T, labels) + top_p_loss(logits, T, P, labels)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return step, tokens


def measure(make, argument, seconds):
    """Tokens per second after one step to warm up, and the growth of the peak memory of this
    process in MiB"""
    torch.manual_seed(0)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    before = peak()
    step, tokens = make(argument)
    step()
    start, n = time.perf_counter(), 0
    while n < 2 or time.perf_counter() - start < seconds: step(); n += 1
    return n*tokens/(time.perf_counter() - start), peak() - before


def training(vocabularies, seconds):
    rows, pool = [], get_context('spawn')
    for v in vocabularies:
        row = dict(vocabulary=v)
        for name,make,argument in (('ours', ours, 'logits'), ('ours_hidden', ours, 'hidden'),
                                   ('autodeco', autodeco, v)):
            with pool.Pool(1) as p:
                row[name], row[f'{name}_mb'] = p.apply(measure, (make, argument, seconds))
        rows.append(row | dict(ratio=row['ours']/row['autodeco'],
                               ratio_hidden=row['ours_hidden']/row['autodeco']))
        print('  '.join(f'{k} {x:,.0f}' for k,x in rows[-1].items()), flush=True)
    return rows


def decoding(model, batch, rounds):
    "Seconds of a decoding step by method: median of the model's step plus median of what follows it"
    v = model.config.vocab_size
    head = {r: TemperatureHead(model.config.hidden_size, reads=r).eval() for r in ('logits', 'hidden')}
    heads = AutoDeco(model.config.hidden_size).eval()
    divided = lambda z, T: z/T[:, None]

    def nucleus(h, z):
        T, P = (x[..., 0] for x in heads(h, z))
        return top_p_filter(divided(z, T), P)
    def ours_at(h, z, reads):
        T = head[reads].temperature(head[reads].live_inputs(h, z))
        return min_p_filter(divided(z, T), .1)
    methods = {'static T, min-p': lambda h, z: min_p_filter(z/.7, .1),
               'static T, top-p': lambda h, z: top_p_filter(z/.7, torch.full((len(z),), .9)),
               'AutoDeco': nucleus,
               'ours': lambda h, z: ours_at(h, z, 'logits'),
               'ours, hidden': lambda h, z: ours_at(h, z, 'hidden')}
    ids, cache, times = torch.randint(v, (batch, 64)), None, {k: [] for k in ('model', *methods)}
    for _ in range(rounds + 1):
        start = time.perf_counter()
        out = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        hidden, cache = out.last_hidden_state[:, -1], out.past_key_values
        logits = model.get_output_embeddings()(hidden)
        times['model'].append(time.perf_counter() - start)
        for name,f in methods.items():
            start = time.perf_counter()
            ids = torch.multinomial(f(hidden, logits).softmax(-1), 1)
            times[name].append(time.perf_counter() - start)
    t = {k: statistics.median(x[1:]) for k,x in times.items()}
    return {k: dict(seconds=t['model'] + t[k],
                    speed=(t['model'] + t['static T, min-p'])/(t['model'] + t[k])) for k in methods}


if __name__ == '__main__':
    p = load_profile(*(sys.argv[1:] or ['embedded']))
    params, small = load_params(p.root), p.name == 'smoke'
    info = json.loads((p.root/'results'/p.name/'prescan.json').read_text())
    sizes = {256} if small else {1024, 8192, 49152, 151936, info['vocabulary']}
    rows = training(sorted(sizes), .05 if small else 2)
    model, tokenizer = load_model(p.root/'models'/p.name, p.dtype)
    with torch.inference_mode(): steps = decoding(model, 16, 3 if small else 15)
    with tempfile.TemporaryDirectory() as folder:
        examples, start = load_examples(p.root, 1 if small else 3), time.perf_counter()
        table = scan(model, tokenizer, examples, folder, p.batch_tokens, progress=False)
        scan_speed = table.info['tokens']/(time.perf_counter() - start)
    at = min(rows, key=lambda r: abs(r['vocabulary'] - info['vocabulary']))
    read = info['tokens_read']/scan_speed
    epoch = {k: info['tokens']/at[k] for k in ('ours', 'autodeco')}
    wall = dict(scan=read, epoch_ours=epoch['ours'], epoch_autodeco=epoch['autodeco'],
                ratio=(read + epoch['autodeco'])/(read + epoch['ours']),
                ours=read + params['steps']*1024/at['ours'],
                autodeco=read + params['steps']*1024/at['autodeco'])
    count = lambda m: sum(x.numel() for x in m.parameters())
    settings = {k: dict(n=sum(map(len, v.values())), objective=len(v['objective']),
                        listed={a: ', '.join(b) for a,b in v.items()}) for k,v in SETTINGS.items()}
    metrics = dict(threads=torch.get_num_threads(), at=at, largest=rows[-1],
                   flat=max(r['ours'] for r in rows)/min(r['ours'] for r in rows), decoding=steps,
                   scan_tokens_per_second=scan_speed, wall=wall, settings=settings,
                   parameters={'ours': count(TemperatureHead(HIDDEN, reads='logits')),
                               'ours, hidden': count(TemperatureHead(HIDDEN, reads='hidden')),
                               'AutoDeco': count(AutoDeco(HIDDEN))})
    save_results(p, 'cost', metrics, cost=pd.DataFrame(rows))
    print(json.dumps(dict(decoding=steps, wall=wall, settings={k: v['n'] for k,v in settings.items()}),
                     indent=1))
