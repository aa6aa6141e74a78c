"""The command line on a file of llama.cpp that holds a base model: what page 25b shows. Gemma-3-270M is joined of its packages, made a
model that can be asked, scanned, asked, and given a head. Writes benchmarks/terminal.json: the commands with what they printed.
Run: make bench-gemma
"""
import json, shlex, subprocess, sys, tempfile
from pathlib import Path

from run import commit, ROOT

from simpledeco.prepare import joined, package_file
from simpledeco.study.settings import load_profile

CHATS = [('What is a lighthouse for?', 'It warns ships of rocks.'), ('Name a river.', 'The Danube.'),
         ('Where does bread come from?', 'From flour, water and an oven.'), ('What do bees make?', 'Bees make honey and wax.')]
SUMS = [(a, b) for a in range(1, 5) for b in range(1, 4)]
COMMANDS = ["prepare gemma.gguf gemma --chat-template questions --stop '\\n'",
            'prescan gemma tokens --data chats.jsonl',
            'answer gemma answers --data questions.jsonl --max-new-tokens 12',
            'train answers head --by prompt --steps 200',
            "generate head gemma 'What is the capital of Peru?' --scale 2 --max-new-tokens 24",
            "generate head gemma 'Write a sentence about the sea.' --scale 2 --max-new-tokens 24",
            "inspect head gemma page.html --prompt 'What is the capital of Peru?' --answer 'Lima.' --scale 2"]


def write_lines(file, rows): file.write_text(''.join(json.dumps(x) + '\n' for x in rows), encoding='utf-8')


def conversation(*texts, **more):
    return dict(messages=[dict(role=r, content=t) for r,t in zip(('user', 'assistant'), texts)], split='train', **more)


def said(command, folder):
    "What a command prints to both streams, the last state of each progress bar without its times"
    done = subprocess.run([Path(sys.executable).parent/'simpledeco', *shlex.split(command)], cwd=folder,
                          text=True, capture_output=True)
    if done.returncode: sys.exit(f'terminal.py: simpledeco {command}: {done.stderr}')
    lines = [line.split('\r')[-1].rstrip() for line in (done.stderr + done.stdout).split('\n')]
    return '\n'.join(x for x in lines if x and '%|' not in x)


if __name__ == '__main__':
    p = load_profile('gemma', ROOT)
    with (joined([package_file(x) for x in p.model.removeprefix('package:').split()], p.sha256) as file,
          tempfile.TemporaryDirectory() as tmp):
        folder = Path(tmp)
        (folder/'gemma.gguf').symlink_to(file)
        write_lines(folder/'chats.jsonl', [conversation(*x) for x in CHATS])
        write_lines(folder/'questions.jsonl', [conversation(f'What is {a} + {b}?', answer=str(a + b)) for a,b in SUMS]
                    + [conversation(f'Write a sentence about {x}.') for x in ('snow', 'a street', 'the sea', 'a loaf of bread')])
        found = [dict(command=f'simpledeco {x}', output=said(x, folder)) for x in COMMANDS]
    write = dict(commit=commit(), model=file.name, sha256=p.sha256, commands=found)
    (ROOT/'benchmarks/terminal.json').write_text(json.dumps(write, indent=1) + '\n')
    for x in found: print(f'$ {x["command"]}\n{x["output"]}\n')
