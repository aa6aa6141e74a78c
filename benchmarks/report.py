"""All that the benchmarks have found, in one table, from the files that they wrote. Run: make bench, or
python benchmarks/report.py

A row is a figure with its 95% interval, the limit that was set for it, and whether it keeps the limit: *met* and *missed*
say so of the whole interval, *open* that the limit lies within.
"""
import json
from pathlib import Path

FILES = {'results': 'Speed of the first over that of the second',
         'sampling': 'Sampling: speed over the bare forward pass, and widths of intervals',
         'growth': 'Growth: exponents of time and memory',
         'page': 'The token page: exponents of time over the tokens of its answer (python benchmarks/page.py)',
         'decode': 'Speed with a head over a static temperature, with vLLM (make bench-vllm)',
         'vocabulary': 'At two vocabularies, on real models (make bench-gemma)',
         'row': 'Speed of a folded model with its processor over static min-p (make bench-vllm)',
         'gpu': 'On a GPU (python benchmarks/gpu.py)'}


def is_figure(x): return isinstance(x, dict) and {'lo', 'hi'} <= set(x) and bool({'ratio', 'exponent'} & set(x))


def figures(found, name=''):
    "(name, figure) of all figures in what a benchmark wrote, however deep they lie, and of what could not be measured"
    for key,x in found.items():
        if not isinstance(x, dict): continue
        here = f'{name}, {key}' if name else key
        if is_figure(x) or 'why' in x: yield here, x
        else: yield from figures(x, here)


def verdict(figure):
    "'met' or 'missed' where the whole interval keeps or breaks the limit, 'open' where it does neither; '' without a limit"
    lo, hi = figure['lo'], figure['hi']
    if 'at_least' in figure: lo, hi, limit = -hi, -lo, -figure['at_least']
    elif 'at_most' in figure: limit = figure['at_most']
    else: return ''
    return 'met' if hi <= limit else 'missed' if lo > limit else 'open'


def number(x): return f'{x:,.0f}' if abs(x) >= 100 else f'{x:.3f}'


def row(name, figure, width=66):
    "A line of the table"
    if 'why' in figure: return f'  {name:<{width}} not measured: {figure["why"]}'
    value = figure['ratio'] if 'ratio' in figure else figure['exponent']
    interval = f'[{number(figure["lo"])}, {number(figure["hi"])}]'
    limits = [f'{sign} {figure[k]:,g}' for k,sign in (('at_least', '>='), ('at_most', '<=')) if k in figure]
    return f'  {name:<{width}} {number(value):>7} {interval:<17} {"".join(limits):<8} {verdict(figure)}'.rstrip()


def table(results):
    "The table, from what the benchmarks wrote by the names of their files"
    lines = []
    for name,found in results.items():
        lines += ['', FILES[name]] + [row(*x) for x in figures(found)]
    return '\n'.join(lines[1:])


def read(folder):
    "What the benchmarks wrote, of those that have run"
    files = {name: Path(folder)/f'{name}.json' for name in FILES}
    return {name: json.loads(f.read_text()) for name,f in files.items() if f.exists()}


if __name__ == '__main__': print(table(read(Path(__file__).parent)))
