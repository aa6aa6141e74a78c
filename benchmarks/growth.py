"""How time and memory grow with the work: pre-scan, training, calibration and sampling, over the corpus, the vocabulary, the
rows of a batch and the length of texts. Writes benchmarks/growth.json. Run: make bench, or python benchmarks/growth.py

One thing grows at a time. Each size has a process of its own, so that its memory is its own, and the sizes take turns. An
exponent is the slope of log time, or log memory, against log size: 1 where twice the work takes twice as long, 0 where it
takes as long as before. That of time is the median of the rounds, with a 95% interval that resamples them. It knows of the
noise alone, not of a curve that is no power: `last` is the slope between the two largest sizes, which says where it tends to.

Memory is what a process holds after it has done the work once, beyond what it began with, a model or a table. Pages of files,
of which a table consists, do not count: the system may drop them. The least that counts is one MiB. It is measured once, and
its interval is the range of the exponents with one size left out. The model has random weights, and SmolLM2's shape but for
two layers in the place of thirty, which leaves more of the time to the vocabulary than there is.
"""
import ctypes, json, os, re, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from cost import autodeco
from gpu import random_model, SHAPES, SMOLLM2
from run import middle

from simpledeco.buckets import all_rows
from simpledeco.contract import calibrate
from simpledeco.head import TemperatureHead
from simpledeco.logits import token_statistics
from simpledeco.sample import constant, head_rule, sample
from simpledeco.scan import scan
from simpledeco.study.autodeco import fit_autodeco
from simpledeco.table import table_schema, TokenTable, write_shard
from simpledeco.train import fit

ROUNDS = 5
SLACK = .1 # of an exponent: a quarter more time where the work is ten times as much
# what a process gives back stays with it, so that what it holds in the end is the most that it held
KEEP = dict(MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_=str(2**34))
CONTEXT = get_context('forkserver')


class Tokenizer:
    "Of a random model: a text is its token ids"
    chat_template = 'ids'
    eos_token_id = 2
    def get_chat_template(self): return self.chat_template
    def apply_chat_template(self, messages, **kw): return messages[-1]['content']
    def __call__(self, text, **kw): return SimpleNamespace(input_ids=[int(x) for x in text.split()])


def model_of(vocabulary):
    "A random model that is as sure of itself as a real one: logits with a standard deviation of about 3"
    model = random_model(SHAPES[SMOLLM2] | dict(num_hidden_layers=2, vocab_size=vocabulary), 'cpu', torch.float32)
    model.get_input_embeddings().weight.mul_(6)
    return model


def random_ids(n, length, vocabulary): return torch.randint(3, vocabulary, (n, length)).tolist()


def prescan(corpus=2048, vocabulary=49152, rows=4, length=128):
    "So many tokens in texts of one length, the last quarter of each answered, so many in a batch"
    model, texts = model_of(vocabulary), random_ids(corpus//length, length, vocabulary)
    same = dict(corpus='own', split='train', messages=[], where=list(range(3*length//4, length)))
    examples = [dict(same, id=str(i), group=str(i), ids=ids) for i,ids in enumerate(texts)]
    def work():
        folder = tempfile.mkdtemp()
        return scan(model, Tokenizer(), examples, folder, rows*length, shard_examples=rows, progress=False).info['tokens']
    return work


def random_table(tokens, vocabulary, width, length=100, each=50):
    "The folder of a table of random tokens, half of them to train on and half to calibrate on"
    folder, names = Path(tempfile.mkdtemp()), [str(i) for i in range(tokens//length)]
    examples = [dict(id=x, group=x, corpus='own', split=('train', 'calibration')[int(x) % 2]) for x in names]
    shape = dict(hidden_size=width, vocab_size=vocabulary, dtype='torch.float32')
    info = dict(shape, model='random', shard_examples=each, schema=table_schema(**shape), examples=examples)
    (folder/'table.json').write_text(json.dumps(info))
    n = length*each
    some = token_statistics(3*torch.randn(n, min(vocabulary, 1024)), torch.randint(min(vocabulary, 1024), (n,)))
    number = torch.arange(n, dtype=torch.int32)
    some = {k: x.clone() for k,x in some.items()} | dict(hidden=torch.randn(n, width), position=number % length) # z_max is a view
    for i in range(len(examples)//each):
        write_shard(folder/f'shard-{i:05d}.safetensors', some | dict(example=number//length + i*each), i, info)
    return folder


def training(corpus=20_000, vocabulary=49152, rows=1024, steps=500):
    "Ours, from a table of so many tokens, so many in a step"
    folder = random_table(corpus, vocabulary, 8) # the head reads logits
    def work():
        fit(TokenTable(folder), batch=rows, steps=steps, select=all_rows)
        return steps*rows
    return work


def from_table(corpus, steps=50, rows=64):
    "AutoDeco, from a table of so many tokens, without the vocabulary"
    folder = random_table(corpus, 49152, 576)
    def work():
        fit_autodeco(TokenTable(folder), steps=steps, batch=rows)
        return steps*rows
    return work


def over_vocabulary(vocabulary=49152, rows=16):
    "AutoDeco, one step of so many tokens over the vocabulary, with logits for free"
    step, tokens = autodeco(vocabulary, rows)
    def work():
        step()
        return tokens
    return work


def calibration(corpus=100_000, vocabulary=49152):
    "Ours, on half the tokens of a table"
    folder, head = random_table(corpus, vocabulary, 8), TemperatureHead(8, base_model='random', t_max=1000.)
    def work():
        calibrate(head, TokenTable(folder), .1)
        return corpus//2
    return work


def sampling(corpus=1, vocabulary=49152, rows=16, length=8):
    "So many texts for each row, four of a prompt and rule, of so many tokens"
    model = model_of(vocabulary)
    head = TemperatureHead(model.config.hidden_size).eval()
    rules = {'T = 1': constant(1.), 'head': head_rule(head)}
    prompts = [[dict(role='user', content=' '.join(map(str, ids)))] for ids in random_ids(corpus*rows//8, 16, vocabulary)]
    def work():
        found = sample(model, Tokenizer(), prompts, rules, 4, length, rows=rows, progress=False)
        return sum(len(a.tokens) for groups in found.values() for group in groups for a in group)
    return work


class Series(NamedTuple):
    stage: str
    make: object # what grows by its name -> a function that does the work once and says of how many tokens
    grows: str
    sizes: tuple
    time: int # the exponents of an ideal
    memory: int


VOCABULARIES = 1024, 8192, 49152, 262144
SERIES = (Series('pre-scan', prescan, 'corpus', (512, 1024, 2560, 5120), 1, 0),
          Series('pre-scan', prescan, 'vocabulary', VOCABULARIES, 1, 1),
          Series('pre-scan', prescan, 'rows', (2, 4, 8, 16), 0, 1),
          Series('pre-scan', prescan, 'length', (64, 128, 256, 512), 0, 1),
          Series('training', training, 'corpus', (20_000, 50_000, 100_000, 200_000), 0, 0),
          Series('training', training, 'vocabulary', VOCABULARIES, 0, 0),
          Series('training', training, 'rows', (256, 512, 1024, 2048), 1, 1),
          Series('AutoDeco from the table', from_table, 'corpus', (10_000, 20_000, 50_000, 100_000), 0, 0),
          Series('AutoDeco', over_vocabulary, 'vocabulary', VOCABULARIES, 1, 1),
          Series('AutoDeco', over_vocabulary, 'rows', (8, 16, 32, 64), 1, 1),
          Series('calibration', calibration, 'corpus', (50_000, 100_000, 200_000, 500_000), 1, 1),
          Series('calibration', calibration, 'vocabulary', VOCABULARIES, 0, 0),
          Series('sampling', sampling, 'corpus', (2, 4, 10, 20), 1, 0),
          Series('sampling', sampling, 'vocabulary', VOCABULARIES, 1, 1),
          Series('sampling', sampling, 'rows', (16, 64, 256, 512), 1, 1),
          Series('sampling', sampling, 'length', (8, 16, 32, 64, 128), 1, 1))


def ready():
    "What the processes find when they start: how memory is kept, and what is imported once for all of them"
    os.environ |= KEEP
    ours = ['contract', 'onpolicy', 'scan', 'train', 'study.autodeco', 'study.results', 'study.texts']
    CONTEXT.set_forkserver_preload(['transformers.models.llama.modeling_llama', *(f'simpledeco.{x}' for x in ours)])


def held():
    "Memory of this process that is of no file, in MiB"
    return int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024


def begin(make, grows, size, folder):
    "In a process: get everything ready, and remember how much memory that takes"
    global work, before
    torch.manual_seed(0)
    tempfile.tempdir = folder
    work = make(**{grows: size})
    ctypes.CDLL(None).malloc_trim(0) # what getting ready has left
    before = held()


def once():
    "In a process: seconds, MiB and tokens of the work"
    start = time.perf_counter()
    tokens = work()
    return time.perf_counter() - start, max(1, held() - before), tokens


def measure(s, rounds=ROUNDS):
    "Seconds, MiB and tokens [rounds + 1, sizes, 3] of a series; the first round warms up"
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        start = lambda size: stack.enter_context(ProcessPoolExecutor(1, CONTEXT, begin, (s.make, s.grows, size, folder)))
        processes, found = [start(size) for size in s.sizes], np.zeros((rounds + 1, len(s.sizes), 3))
        for i in range(rounds + 1):
            for k in range(len(processes))[::-1 if i % 2 else 1]:
                found[i, k] = processes[k].submit(once).result()
    return found


def slope(sizes, values):
    "Of log values [..., sizes] against log sizes, by least squares"
    return np.polyfit(np.log(sizes), np.log(values).T, 1)[0]


def exponent(sizes, values, ideal):
    "The median of the slopes of rounds [rounds, sizes], beside that of an ideal"
    last = np.median(slope(sizes[-2:], values[:, -2:]))
    return dict(zip(('exponent', 'lo', 'hi'), middle(slope(sizes, values)))) | dict(at_most=ideal + SLACK, last=float(last))


def exponent_once(sizes, values, ideal):
    "The slope of values [sizes] that were measured once, and its range with one of them left out"
    fewer = [slope(np.delete(sizes, i), np.delete(values, i)) for i in range(len(sizes))]
    return dict(exponent=slope(sizes, values), lo=min(fewer), hi=max(fewer), at_most=ideal + SLACK, last=slope(sizes[-2:], values[-2:]))


def figures(s, found):
    "What is written of a series: of each size the medians, and both exponents"
    seconds, memory, tokens = found[1:, :, 0], found[0, :, 1], found[1:, :, 2]
    middles = dict(seconds=np.median(seconds, 0), megabytes=memory, tokens_per_second=np.median(tokens/seconds, 0))
    return (dict(sizes=s.sizes, rounds=len(seconds)) | {k: v.tolist() for k,v in middles.items()}
            | dict(time=exponent(s.sizes, seconds, s.time), memory=exponent_once(s.sizes, memory, s.memory)))


if __name__ == '__main__':
    ready()
    results = dict(threads=torch.get_num_threads(), load_before=os.getloadavg()[0])
    for s in SERIES:
        results[f'{s.stage} over {s.grows}'] = found = figures(s, measure(s))
        print(f'{s.stage} over {s.grows}', found, file=sys.stderr, flush=True)
        (Path(__file__).parent/'growth.json').write_text(json.dumps(results, indent=1) + '\n')
