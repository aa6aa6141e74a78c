"""A head that has learned from this project's prompts, on questions and instructions that people wrote: `simpledeco compare`
on public rows that stay where they are. Run: python benchmarks/public.py FOLDER PROFILE OUT, after `make full` or `make gemma-full`,
whose head of all kinds of prompts it takes; benchmarks/public.json is of [full], benchmarks/public-gemma.json of [gemma-full].

FOLDER holds webquestions/validation.json (WebQuestions: qText and answers, CC BY 4.0), nq_open/validation.jsonl (NQ-open:
question and answer, CC BY-SA 3.0) and instructions/user_oriented.jsonl (Self-Instruct: those without an input are the open
prompts, Apache-2.0). Of each a sample is drawn with a fixed seed; every row counts as a group of its own.
"""
import json, subprocess, sys
from pathlib import Path
from random import Random

from simpledeco.files import json_lines
from simpledeco.study.hub import SCHEMAS

ROOT, MOST, SCALE = Path(__file__).parent.parent, dict(webquestions=80, nq_open=80, instructions=60), 2


def rows(folder):
    "(corpus, prompt, accepted answers or None), as the adapters of the hub read them"
    asked = [dict(x, question=x['qText']) for x in json.loads((folder/'webquestions/validation.json').read_text(encoding='utf-8'))]
    lines = lambda name: [x for _,x in json_lines(folder/name)]
    for name,found in dict(webquestions=asked, nq_open=lines('nq_open/validation.jsonl'),
                           instructions=lines('instructions/user_oriented.jsonl')).items():
        for group,_,answers in filter(None, map(SCHEMAS[name].adapt, found)): yield name, group, answers or None


if __name__ == '__main__':
    folder, profile, to = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    head = ROOT/'judged'/profile/'seed-0/mix'
    found, out = list(rows(folder)), ROOT/'build/public'/profile
    out.mkdir(parents=True, exist_ok=True)
    for corpus,most in MOST.items():
        mine = [x for x in found if x[0] == corpus]
        some = Random(0).sample(mine, min(most, len(mine)))
        lines = [dict(messages=[dict(role='user', content=ask)], split='test', **({} if answers is None else dict(answer=answers)))
                 for _,ask,answers in some]
        (out/f'{corpus}.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n', encoding='utf-8')
    data = [x for corpus in MOST for x in ('--data', str(out/f'{corpus}.jsonl'))]
    subprocess.run(['simpledeco', 'compare', str(head), str(ROOT/'models'/profile), *data, '--scale', str(SCALE),
                    '--out', str(out/'found')], check=True)
    said = json.loads((out/'found/compare.json').read_text(encoding='utf-8'))
    made = {k: v for k,v in said.pop('made').items() if k not in ('head', 'prompts')}
    write = dict(head=head.name, rows=MOST, licences='CC BY 4.0, CC BY-SA 3.0, Apache-2.0', **said, made=made)
    to.write_text(json.dumps(write, indent=1) + '\n')
