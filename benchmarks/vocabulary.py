"""What a vocabulary of 262,144 tokens costs beside one of 49,152, on two real models: the pre-scan over the bare forward pass, training
steps of ours over AutoDeco's, and decoding steps with a head over a static temperature. Writes benchmarks/vocabulary.json.
Run: make bench-gemma

The measurements are those of run.py, where whatever is compared takes turns; a training step has the width of the model.
"""
import json, os, sys

import cost, torch
from run import commit, decoding, prescan, ROOT, training

from simpledeco.model import load_model, sizes
from simpledeco.study.models import model_folder
from simpledeco.study.settings import load_profile

PROFILES = 'embedded', 'gemma-further' # SmolLM2, Gemma


def parts(profile, rounds, calls):
    "(name, figure) of a profile's model, and its sizes first"
    p, (model, tokenizer) = load_profile(profile, ROOT), load_model(model_folder(profile, ROOT))
    cost.HIDDEN, vocabulary = sizes(model)
    yield from dict(vocabulary=vocabulary, hidden_size=cost.HIDDEN, parameters=model.num_parameters()).items()
    yield 'prescan', prescan(model, tokenizer, p)
    yield 'training', training(vocabulary, rounds)
    yield 'decoding', {reads: decoding(model, tokenizer, reads, calls) for reads in ('logits', 'hidden')}


if __name__ == '__main__':
    torch.manual_seed(0)
    results = dict(commit=commit(), threads=torch.get_num_threads(), load_before=os.getloadavg()[0])
    for profile in PROFILES:
        results[profile] = {}
        for name,found in parts(profile, 8, 4):
            results[profile][name] = found
            print(profile, name, found, file=sys.stderr, flush=True)
            (ROOT/'benchmarks/vocabulary.json').write_text(json.dumps(results, indent=1) + '\n')
