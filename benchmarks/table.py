"""One table of all that was measured: each figure a ratio of one run, its 95% interval, and the limit that it must
keep. Reads the JSON files of this folder. Run: python benchmarks/table.py
"""
import json
from pathlib import Path

LIMITS = {'pre-scan / bare forward': '>= 0.9', 'peak memory, corpus x 4': '<= 1.05', 'sampling / bare': '>= 0.8',
          'min-p filter / transformers': '>= 1', 'transformers, ': '>= 0.985', 'vllm, ': '>= 0.985',
          'training tokens/s at V = 49,152': '>= 1000'}


def ratios(found, name=''):
    "(name, result) of every result that has a ratio, at any depth"
    if not isinstance(found, dict): return
    if 'ratio' in found: yield name, found
    elif name.startswith('training'):
        at = {k: v for k,v in found.items() if k.startswith('ratio at')}
        yield from ((k.replace('ratio', 'training tokens/s'), dict(ratio=v)) for k,v in at.items())
    else:
        for k,v in found.items(): yield from ratios(v, f'{name}, {k}'.strip(', '))


def line(name, x):
    "A line of the table"
    interval = f"[{x['lo']:,.3f}, {x['hi']:,.3f}]" if 'lo' in x else ''
    limit = next((limit for key,limit in LIMITS.items() if key in name), '')
    return f"{name:<46} {x['ratio']:>10,.3f}  {interval:<18} {limit}"


if __name__ == '__main__':
    for file in sorted(Path(__file__).parent.glob('*.json')):
        lines = [line(*pair) for pair in ratios(json.loads(file.read_text()))]
        if lines: print(file.name, *lines, sep='\n', end='\n\n')
