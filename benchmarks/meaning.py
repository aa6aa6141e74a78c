"""By token or by prompt, where variety is variety of meaning: the texts that the stage `rungs` has kept, read by a sentence encoder and by
the other model of the study. Writes OUT.json, how much better one decoder is than another where both are equally varied, and beside it a
CSV with the means of each cluster. Run: make meaning, after `make rungs-further` and `make gemma-further`
"""
import argparse, gzip, json
from pathlib import Path

import pandas as pd
from run import commit
from tqdm import tqdm

from simpledeco.model import load_model
from simpledeco.study.meaning import apart, likely, load_encoder
from simpledeco.study.models import model_folder
from simpledeco.study.plan import AT, BASE, TASKS
from simpledeco.study.settings import load_params, load_profile, project_root
from simpledeco.study.strengths import cluster, tasks_of, tree_of, verdicts

PAIRS = [('by token', 'by prompt'), ('by token', BASE), ('by prompt', BASE), ('capital letter', BASE),
         ('by token', 'capital letter')]
KEY = ['decoder', 'strength', 'prompt']
EACH = 1 # of the texts to a prompt, the other model reads so many


def kept(folder): # a row for each decoder that is compared, strength, seed and prompt, with its texts
    frames = []
    for file in sorted(folder.glob('*.jsonl.gz')):
        with gzip.open(file, 'rt', encoding='utf-8') as f: said = pd.DataFrame(map(json.loads, f)).drop_duplicates(KEY, keep='last')
        scores = pd.read_csv(folder/f'{file.name.removesuffix(".jsonl.gz")}.csv')
        frames.append(scores.merge(said, on=KEY, validate='one_to_one'))
        if len(frames[-1]) < len(scores): raise ValueError(f'{file} lacks texts of scores in the CSV beside it: remove both, sample again')
    if not frames: raise FileNotFoundError(f'no texts in {folder}: run `make {folder.name}` first')
    frame = pd.concat(frames, ignore_index=True)
    return frame[frame.decoder.isin({x for pair in PAIRS for x in pair})]


def checked(frame, tasks): # the frame
    for task,rows in frame.groupby('task'):
        was = rows.drop_duplicates('prompt').set_index('prompt').cluster.to_dict()
        if was != dict(enumerate(map(cluster, tasks[task]))): raise ValueError(f'{task}: the texts answer other prompts')
    return frame


def read(frame, tasks, encoder, other=None): # the frame with meaning, and nats a token under another model
    rows = [(tasks[task][i]['messages'], texts) for task,i,texts in zip(frame.task, frame.prompt, frame.texts)]
    frame = frame.assign(meaning=[apart(encoder, texts) for _,texts in tqdm(rows, unit='prompt')])
    if other is None: return frame
    return frame.assign(nats=[pd.Series(likely(*other, m, texts[:EACH])).mean() for m,texts in tqdm(rows, unit='prompt')])


def gains(frame, **options): # of quality, variety, task, at, decoder, rival
    "How good, and how likely, decoders are where they are equally varied, in words and in meaning"
    found, texts = [], {k: (varied, varied) for k,(_,varied) in TASKS.items()}
    for by in ('varied', 'meaning'):
        same = frame.assign(varied=frame[by])
        read_by_other = [('likely', same.assign(good=-same.nats), texts)] if 'nats' in frame else []
        for quality,rows,tasks in (('good', same, TASKS), *read_by_other):
            found.append(verdicts(rows, tasks, PAIRS, AT, **options).assign(quality=quality, by=by))
    return pd.concat(found, ignore_index=True)


def other_of(name): # the profile of the other model that asks the same tasks
    return name.replace('gemma', 'rungs') if 'gemma' in name else name.replace('rungs', 'gemma')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('learned', type=Path, help='learned/PROFILE, with texts')
    parser.add_argument('out', type=Path, help='the JSON file to write')
    parser.add_argument('--unread', action='store_true', help='variety of meaning alone, in minutes')
    parser.add_argument('--decoders', nargs='+', help='whose texts, if not those of all that are compared')
    args, root = parser.parse_args(), project_root()
    p, params = load_profile(args.learned.name, root), load_params(root)
    frame = kept(args.learned)[lambda x: x.decoder.isin(args.decoders or x.decoder)]
    tasks = tasks_of(p, *load_model(model_folder(p.name, root)), params['min_p'])
    other = None if args.unread else load_model(model_folder(other_of(p.name), root))
    frame = read(checked(frame, tasks), tasks, load_encoder(), other)
    by = ['task', 'decoder', 'strength', 'seed', 'cluster']
    means = frame.groupby(by, sort=False)[[x for x in ('good', 'varied', 'meaning', 'nats') if x in frame]].mean()
    means.to_csv(args.out.with_suffix('.csv'), float_format='%.5g')
    found = gains(frame, bootstrap=params['bootstrap'], seed=params['seed'])
    reader = None if args.unread else other_of(p.name)
    write = dict(commit=commit(), profile=p.name, read_by=reader, texts=int(frame.texts.map(len).sum()),
                 clusters=int(frame.cluster.nunique()), seeds=int(frame.seed.nunique()),
                 gains=tree_of(found, 'quality', 'by', 'task', 'at', 'decoder', 'rival'))
    args.out.write_text(json.dumps(write, indent=1) + '\n')
    print(found.round(3).to_string(index=False))
