"""Training speed of our loss against AutoDeco's, over the size of the vocabulary, in one run.

Each step is forward, backward and optimiser on the same number of tokens with random inputs. AutoDeco's step has both heads and both losses, with its full sort of the vocabulary;
the logits are given to it for free. Ours reads cached features and gaps. Prints a table and writes benchmarks/training.json. Run: python benchmarks/training.py
"""
import json, time
from pathlib import Path

import torch

from simpledeco.autodeco import TempHead, TopPHead, temperature_loss, top_p_loss
from simpledeco.head import TemperatureHead
from simpledeco.loss import minimum_sufficient_hinge


def speed(step, tokens, seconds=4):
    "Tokens per second of a step, after one step to warm up"
    step()
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds: step(); n += 1
    return n*tokens/(time.perf_counter() - start)


def ours(reads, hidden_size=576, tokens=1024):
    head = TemperatureHead(hidden_size, reads=reads)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3)
    x, gap = torch.randn(tokens, hidden_size if reads == 'hidden' else len(head.mean)), 5*torch.rand(tokens)

    def step():
        loss = minimum_sufficient_hinge(head(x), gap)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return speed(step, tokens)


def autodeco(vocabulary, hidden_size=576, tokens=64):
    heads = TempHead(hidden_size), TopPHead(hidden_size)
    optimizer = torch.optim.AdamW([p for h in heads for p in h.parameters()], 5e-6)
    hidden, logits = torch.randn(1, tokens + 1, hidden_size), 3*torch.randn(1, tokens + 1, vocabulary)
    labels = torch.randint(vocabulary, (1, tokens + 1))

    def step():
        T = heads[0](hidden)
        P = heads[1](hidden, T.detach(), logits)
        loss = temperature_loss(logits, T, labels) + top_p_loss(logits, T, P, labels)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return speed(step, tokens)


if __name__ == '__main__':
    torch.manual_seed(0)
    rows = []
    for v in (1024, 8192, 49152, 151936):
        row = dict(vocabulary=v, ours=ours('logits'), ours_hidden=ours('hidden'), autodeco=autodeco(v))
        rows.append(row | dict(ratio=row['ours']/row['autodeco'], ratio_hidden=row['ours_hidden']/row['autodeco']))
        print('  '.join(f'{k} {x:,.0f}' for k,x in rows[-1].items()), flush=True)
    (Path(__file__).parent/'training.json').write_text(json.dumps(dict(unit='tokens/s', threads=torch.get_num_threads(), rows=rows), indent=1))
