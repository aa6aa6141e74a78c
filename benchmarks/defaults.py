"""What becomes of a head's promise when a model's own generation settings stay in force beside it: the share of true
tokens that can still be drawn, with the settings that popular instruct models ship. Writes
benchmarks/defaults.json. Run: make bench

A true token is a token of a held-out conversation; it is kept if `generate`, given what stands before it, leaves it a
probability. What `generate` would do to the logits is taken from itself: it hands the processors that it has prepared to the
function `custom_generate`.
"""
import json, sys
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, LogitsProcessorList

from simpledeco.conversations import context_length, encode, end_tokens
from simpledeco.decode import attach, min_p_filter, sampling
from simpledeco.evaluate import cluster_mean
from simpledeco.loss import required_temperature
from simpledeco.model import load_model, read_output
from simpledeco.study.data import load_examples
from simpledeco.study.models import model_folder
from simpledeco.study.profiles import sample_table
from simpledeco.study.settings import project_root
from simpledeco.train import fit

# as in the generation_config.json of each model, on 2026-11-26, without what has no part in this
SHIPPED = {'none': {},
           'Qwen/Qwen2.5-7B-Instruct': dict(do_sample=True, temperature=.7, top_p=.8, top_k=20,
                                            repetition_penalty=1.05),
           'meta-llama/Llama-3.1-8B-Instruct': dict(do_sample=True, temperature=.6, top_p=.9),
           'google/gemma-3-4b-it': dict(do_sample=True, top_k=64, top_p=.95)}
RISK, EACH = .1, 3 # of the head; held-out conversations of each corpus


def before(head):
    "Options that turn off top-k alone, with min-p as a processor, which `generate` applies before the temperature"
    min_p = lambda ids, z: min_p_filter(z, head.min_p)
    return dict(do_sample=True, top_k=0, logits_processor=LogitsProcessorList([min_p]))


def processors(model, options):
    "What `generate` does to the logits with these options"
    found = []
    def keep(model, input_ids, logits_processor, stopping_criteria, generation_config, **kw):
        found.append(logits_processor)
        return input_ids
    model.generate(torch.tensor([[1, 2]]), custom_generate=keep, max_new_tokens=1, pad_token_id=0, **options)
    return found[0]


@torch.no_grad()
def divided(model, head, ids, where):
    "The logits that `generate` sees where the tokens of a conversation at `where` are to come [N, V]"
    with attach(model, head): return model(input_ids=torch.tensor([ids])).logits[0, [i - 1 for i in where]].float()


def kept_of(z, ids, where, process):
    "Which of these tokens can be drawn [N]"
    scores = [process(torch.tensor([ids[:i]]), row[None].clone())[0, ids[i]] for i,row in zip(where, z)]
    return torch.isfinite(torch.stack(scores)).tolist()


@torch.no_grad()
def promised(model, head, ids, where):
    "The same by the closed form: the gap of the token is at most T log(1/min_p)"
    hidden, z, _ = read_output(model, lambda h: h[0, [i - 1 for i in where]], input_ids=torch.tensor([ids]))
    gap = z.max(1).values - z.gather(1, torch.tensor([[ids[i]] for i in where]))[:, 0]
    return (required_temperature(gap, head.min_p) <= head.temperature(head.live_inputs(hidden, z))).tolist()


def ways(model, head):
    "{(name, way): what `generate` does to the logits}"
    found = {}
    for name,own in SHIPPED.items():
        model.generation_config = GenerationConfig(**own)
        found[name, 'before'] = processors(model, before(head))
        found[name, 'now'] = processors(model, sampling(head))
    return found


def share(kept):
    "Share of tokens kept, from a list for each conversation, with an interval that resamples conversations"
    group = torch.tensor([i for i,x in enumerate(kept) for _ in x])
    return cluster_mean(torch.tensor(sum(kept, [])).float(), group)


def measure():
    root = project_root(Path(__file__).parent)
    model, tokenizer = load_model(model_folder('embedded'))
    head, ends = fit(sample_table(), risk=RISK), end_tokens(model, tokenizer)
    held = [x for x in load_examples(root, EACH) if x['split'] == 'test']
    encoded = [encode(x, tokenizer, context_length(model), ends) for x in held]
    process, closed = ways(model, head), share([promised(model, head, *x) for x in encoded])
    kept = {k: [] for k in process}
    for ids,where in encoded:
        z = divided(model, head, ids, where)
        for k,p in process.items(): kept[k].append(kept_of(z, ids, where, p))
    shares = {name: {way: share(kept[name, way]) for way in ('before', 'now')} for name in SHIPPED}
    return dict(model='SmolLM2-135M-Instruct', transformers_version=transformers.__version__, risk=RISK,
                min_p=head.min_p, conversations=len(encoded), closed_form=closed,
                shipped_with={name: dict(settings=own, **shares[name]) for name,own in SHIPPED.items()})


if __name__ == '__main__':
    transformers.logging.set_verbosity_error() # it warns of arguments beside a configuration
    results = measure()
    for name,x in results['shipped_with'].items():
        print(f'{name:<34} before {x["before"]["mean"]:.1%}  now {x["now"]["mean"]:.1%}', file=sys.stderr)
    (Path(__file__).parent/'defaults.json').write_text(json.dumps(results, indent=1) + '\n')
