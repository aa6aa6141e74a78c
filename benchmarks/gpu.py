"""Pre-scan, training, decoding and a small frontier on a GPU, in bfloat16.
Run: python benchmarks/gpu.py

Two models: SmolLM2, with the text of the embedded profile; and one of Llama-3-8B's shape with
random weights, made on the spot, for the figures that do not depend on weights. It reads text that
it has written itself, so that its true tokens are among its likely ones, as in real text. Where
models/embedded is missing, SmolLM2 is a random model of its shape too, and there is no frontier.

Whatever is compared takes turns, batch by batch or step by step, and every clock waits for the GPU.
The results, benchmarks/gpu.json, are written after each measurement, so that a run which is cut off
keeps what it has; --only MODEL adds one model to a file that holds the other. To try the script
without a GPU:

    python benchmarks/gpu.py --device cpu --tiny --out FILE
"""
import argparse, json, os, sys, tempfile, time, traceback
from contextlib import nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch, transformers
from run import ROOT, commit, compared, turns
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessorList, TemperatureLogitsWarper

from simpledeco import logits
from simpledeco.buckets import all_rows, training_rows
from simpledeco.conversations import encoder
from simpledeco.decode import attach, sampling
from simpledeco.head import TemperatureHead
from simpledeco.loss import minimum_sufficient_hinge, required_temperature
from simpledeco.model import fingerprint, load_model, sizes
from simpledeco.onpolicy import fit_answers, on_policy
from simpledeco.scan import _batches, _scan_batch, scan
from simpledeco.study.decoders import DECODERS, Texts
from simpledeco.study.profiles import profile_examples, profile_prompts
from simpledeco.study.settings import load_params, load_profile
from simpledeco.study.texts import (collect, judged, left_out, Points, test_prompts,
                                    training_plan, variety)
from simpledeco.train import fit

SMOLLM2, LLAMA = 'SmolLM2-135M', 'Llama-3-8B'
SHAPES = {SMOLLM2: dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
                        tie_word_embeddings=True),
          LLAMA: dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                      num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)}
TINY = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1)
# conversations of a random model, with so many tokens asked and answered; examples of each corpus
# and split for a real one;
# so many pairs of batches; the sizes of batches to decode with, and how often each
SIZES = dict(conversations=128, asked=128, answered=256, examples=80, batch_tokens=16384, rounds=8,
             steps=1500, batches=(1, 16, 64, 256), calls=1)
SMALL = dict(conversations=24, asked=8, answered=16, examples=12, batch_tokens=512, rounds=2, steps=20,
             batches=(1, 2), calls=1)
HEADS = dict(logits=128, hidden=0) # what a head reads: its width
BLOCK = 16 # rows, as on a CPU, whose cache they suit; on a GPU the package takes 1,024
# the static temperature; steps before the first that counts, and how many count: multiples of
# four
T, SKIP, STEPS = .7, 4, 60
FRONTIER = ('greedy', 'T = 0.3', 'T = 0.7', 'T = 1', 'T = 1.5') # the constants, all with min-p


def clock(device):
    "The time when the device has done what it was told"
    if device != 'cpu': torch.cuda.synchronize()
    return time.perf_counter()


def gigabytes(device, work):
    "What PyTorch has allocated at most while some work was done, weights included; None on a CPU"
    if device == 'cpu': return None
    torch.cuda.reset_peak_memory_stats(); work(); torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()/1e9


def random_model(shape, device, dtype=torch.bfloat16):
    "A Llama of that shape, made on the device"
    torch.manual_seed(0)
    config = LlamaConfig(**shape)
    with torch.device(device): model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def forced(model, ids, new, **options):
    "`generate` that writes exactly `new` tokens"
    lengths = dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **lengths, **options)


def written(m):
    "Conversations that a random model wrote itself, each token among the 64 likeliest"
    ids = torch.randint(3, m.model.config.vocab_size, (m.conversations, m.asked), device=m.device)
    texts = forced(m.model, ids, m.answered, do_sample=True, top_k=64).tolist()
    same = dict(corpus='own', split='train', messages=[], where=list(range(m.asked, m.asked + m.answered)))
    return [dict(same, id=str(i), group=str(i), ids=text) for i,text in enumerate(texts)]


@torch.inference_mode()
def bare(model, encoded, device):
    "Hidden states and output embedding on the same batch: what no scan can avoid"
    width = max(len(ids) for ids,_ in encoded)
    ids, mask = torch.zeros(2, len(encoded), width, dtype=torch.long)
    for row,(tokens,_) in enumerate(encoded):
        ids[row, :len(tokens)] = torch.tensor(tokens); mask[row, :len(tokens)] = 1
    r = torch.tensor([row for row,(_,where) in enumerate(encoded) for _ in where], device=device)
    c = torch.tensor([i for _,where in encoded for i in where], device=device)
    hidden = model.base_model(input_ids=ids.to(device),
                              attention_mask=mask.to(device)).last_hidden_state
    return model.get_output_embeddings()(hidden[r, c-1])


def batches_of(m):
    "Some batches of the scan, of all lengths, as (ids, positions of responses) pairs"
    to_ids = encoder(m.model, m.tokenizer, None)
    encoded = [to_ids(x) for x in m.examples]
    batches = _batches(encoded, m.batch_tokens)
    return [[encoded[k] for k in batches[i*len(batches)//m.rounds]] for i in range(m.rounds)]


def prescan(m, block=None):
    """A batch of the scan, with its statistics taken of `block` rows at a time, against the bare
    forward pass"""
    used = batches_of(m)
    plain = lambda i: bare(m.model, used[i], m.device)
    ours = lambda i: _scan_batch(m.model, used[i], range(len(used[i])))
    with patch.object(logits, '_partition',
                      partial(logits._partition, rows=block)) if block else nullcontext():
        memory = dict(bare_gigabytes=gigabytes(m.device, lambda: plain(0)),
                      scan_gigabytes=gigabytes(m.device, lambda: ours(0)))
        speed, of_bare, of_scan = compared(turns(plain, ours, m.rounds, clock=lambda: clock(m.device)))
    tokens, responses = (sum(len(x[k]) for b in used for x in b) for k in (0, 1))
    padded = sum(len(b)*max(len(ids) for ids,_ in b) for b in used)
    shares = dict(share_of_padding=1 - tokens/padded, share_of_responses=responses/tokens)
    speeds = dict(bare_tokens_per_second=tokens/of_bare, scan_tokens_per_second=tokens/of_scan)
    return speed | speeds | memory | shares | dict(batch_tokens=m.batch_tokens)


def whole_scan(m):
    "The scan as a user runs it, with tokenising and with the table on the disk"
    start = clock(m.device)
    m.table = scan(m.model, m.tokenizer, m.examples, m.folder/'table', m.batch_tokens, 256,
                   progress=False)
    seconds, tokens = clock(m.device) - start, m.table.info['tokens']
    size = sum(f.stat().st_size for f in m.table.path.iterdir())
    return dict(seconds=seconds, tokens=tokens, tokens_per_second=tokens/seconds, rows=len(m.table),
                table_gigabytes=size/1e9)


def training(m, reads):
    "A head from the table, on the CPU of that machine: training needs no GPU"
    # a random model is never confident
    start, select = time.perf_counter(), training_rows if m.weights == 'real' else all_rows
    head = fit(m.table, m.mix, reads=reads, width=HEADS[reads], steps=m.steps, select=select)
    out = dict(seconds=time.perf_counter() - start, steps=m.steps, tokens_a_step=1024,
               width=HEADS[reads],
               parameters=sum(x.numel() for x in head.parameters()), threads=torch.get_num_threads())
    return out | (on_test(head, m.table, m.mix) if m.weights == 'real' else {})


def on_test(head, table, corpora):
    "What the head is worth on the test split of the corpora that it was trained on"
    rows = table.rows(corpora, ['test'])
    tau, gap = head.temperatures(table, rows), table['gap'][rows]
    kept = (required_temperature(gap, head.min_p) <= tau).float().mean().item()
    loss = minimum_sufficient_hinge(tau, gap, min_p=head.min_p, risk=head.risk).item()
    return dict(test_loss=loss, test_kept=kept, test_temperature=tau.mean().item(),
                test_tokens=len(rows))


def heads_turn(seen):
    "Whether the step that began last is one with the head: H S S H"
    return len(seen) % 4 in (0, 1)


def decoding(m, reads, batch):
    "Steps of `generate` with a head over those with a static temperature and the same min-p, in turns in one text"
    head = TemperatureHead(sizes(m.model)[0], reads=reads, width=HEADS[reads], base_model=fingerprint(m.model)).eval()
    attachment, seen, static = attach(m.model, head), [], TemperatureLogitsWarper(T)
    attachment.remove() # it is called by hand, at every second step
    def hook(module, args, logits):
        seen.append(clock(m.device))
        return attachment(module, args, logits) if heads_turn(seen) else logits
    turn = lambda ids, scores: scores if heads_turn(seen) else static(ids, scores)
    options = sampling(head) | dict(logits_processor=LogitsProcessorList([turn])) # its min-p comes after
    ids = torch.randint(3, m.model.config.vocab_size, (batch, m.asked), device=m.device)
    def steps():
        seen.clear(); forced(m.model, ids, SKIP + STEPS + 1, **options)
        return np.diff(seen)[SKIP:SKIP + STEPS]
    handle = m.model.get_output_embeddings().register_forward_hook(hook)
    try:
        # the first call warms up
        times = np.stack([steps() for _ in range(m.calls + 1)])[1:].reshape(-1, 4)
    finally: handle.remove()
    return dict(of_steps(times, batch), context_tokens=m.asked)


def of_steps(times, batch):
    "Speed with the head over that without, from seconds [N, 4] of the steps H S S H"
    pairs = np.concatenate([times[:, [1, 0]], times[:, [2, 3]]]) # static, head
    static, head = np.median(pairs, 0).tolist()
    cost = float(np.median(pairs[:, 1] - pairs[:, 0]))
    milliseconds = dict(head_milliseconds=1000*head, static_milliseconds=1000*static,
                        cost_milliseconds=1000*cost)
    return compared(pairs)[0] | milliseconds | dict(head_tokens_per_second=batch/head)


def answered(m):
    """Heads from the model's own judged answers, one for each family that is left out, and what
    they cost"""
    p, params, start, examples = m.profile, load_params(m.profile.root), clock(m.device), []
    asked = profile_prompts(p, p.prompts, ['train'])
    for closed,length in ((True, p.answer_tokens), (False, p.open_tokens)):
        some = [x for x in asked if bool(x['answer']) == closed]
        examples += on_policy(m.model, m.tokenizer, some, p.samples, length, progress=False)
    wrote = clock(m.device)
    table = scan(m.model, m.tokenizer, examples, m.folder/'answers', m.batch_tokens, 256,
                 progress=False)
    scanned, plan = clock(m.device), training_plan(p, dict.fromkeys(x['corpus'] for x in examples))
    how = dict(min_p=params['min_p'], risk=params['answer_risk'], steps=m.steps)
    heads = {mix: fit_answers(table, examples, plan[mix], **how).to(m.device)
             for mix in sorted(set(left_out(p).values()))}
    right = float(np.mean([x['right'] for x in examples if x['answer']]))
    return heads, dict(answers=len(examples), answer_tokens=len(table), right=right,
                       sampling_seconds=wrote - start, scan_seconds=scanned - wrote,
                       training_seconds_a_head=(clock(m.device) - scanned)/len(heads))


def frontier(m):
    """Accuracy on questions and variety on open prompts: constants with min-p, EDT, and heads that
    have not seen the family"""
    heads, costs = answered(m)
    p, params, primary = m.profile, load_params(m.profile.root), m.profile.primary.split()
    (questions, opens), who, answers = test_prompts(p, 'test', primary), left_out(p), {}
    names, start = (*FRONTIER, 'EDT', 'judged, left out'), clock(m.device)
    for corpus in (*primary, p.open):
        asked, length = ((opens, p.open_test_tokens)
                         if corpus == p.open else (questions[corpus], p.answer_tokens))
        c = Texts(params['min_p'], params['answer_risk'], params['scale'], asked, who[corpus], heads)
        rules = {d: DECODERS[d].live(c) for d in names}
        collect(answers, corpus, asked, rules, m.model, m.tokenizer, p.samples, length)
    seconds, tokens = clock(m.device) - start, sum(map(tokens_in, answers.values()))
    right = judged(answers, questions, m.tokenizer)
    varieties = {d: variety(answers[p.open][d]) for d in names}
    sizes = dict(questions=sum(map(len, questions.values())), opens=len(opens), samples=p.samples)
    speed = dict(sampled_tokens=tokens, sampled_tokens_per_second=tokens/seconds)
    setting = dict(scale=params['scale'], risk=params['answer_risk'])
    return (costs | sizes | speed | setting
            | dict(decoders=placed(Points(right, varieties, FRONTIER, questions, opens), names, primary)))


def tokens_in(answers):
    "The number of tokens in the answers to the prompts of one corpus, of all decoders"
    return sum(len(a.tokens) for seeds in answers.values() for prompts in seeds for group in prompts
               for a in group)


def placed(points, names, corpora):
    "Where each decoder lies, and how far above the frontier of the constants"
    above = lambda d: {} if d in FRONTIER else dict(excess=points.excess(d, corpora))
    return {d: points.alone(d, corpora) | above(d) for d in names}


def subject(name, o, folder):
    "A model and what it reads"
    here = ROOT/'models'/o.profile
    m = SimpleNamespace(device=o.device, folder=Path(folder), profile=load_profile(o.profile, ROOT),
                        **(SMALL if o.tiny else SIZES))
    if name == SMOLLM2 and (here/'config.json').exists():
        m.weights, m.mix = 'real', load_params(ROOT)['train_corpora'].split()
        m.model, m.tokenizer = load_model(here, o.dtype, o.device)
        m.profile.max_examples = m.examples
        m.examples = profile_examples(m.profile)
    else:
        m.weights = 'random'
        m.mix = None
        m.tokenizer = SimpleNamespace(eos_token_id=2, chat_template=None)
        m.model = random_model(TINY if o.tiny else SHAPES[name], o.device)
        m.examples = written(m)
    return m


def about(m, o):
    "Where and with what the figures of a model were measured"
    card = dict(card='none: cpu')
    if o.device != 'cpu':
        properties = torch.cuda.get_device_properties(o.device)
        card = dict(card=properties.name, card_gigabytes=properties.total_memory/1e9)
    versions = dict(torch_version=torch.__version__, transformers_version=transformers.__version__,
                    commit=o.commit)
    now = datetime.now(timezone.utc).isoformat(timespec='seconds')
    what = dict(weights=m.weights, dtype=str(m.model.dtype).removeprefix('torch.'), parameters=m.model.num_parameters(),
                vocabulary=m.model.config.vocab_size)
    return card | dict(cores=os.cpu_count(), date=now, tiny=o.tiny) | versions | what


def measurements(m):
    "(name, function), the most wanted first, should the time run out"
    yield 'pre-scan / bare forward', lambda: prescan(m)
    yield f'pre-scan in blocks of {BLOCK:,} rows / bare forward', lambda: prescan(m, BLOCK)
    if m.weights == 'random': yield from decodings(m) # of the shape that people serve
    yield 'whole scan', lambda: whole_scan(m)
    for reads in HEADS: yield f'training, {reads}', lambda: training(m, reads)
    if m.weights == 'real':
        yield 'frontier', lambda: frontier(m)
        yield from decodings(m)


def decodings(m):
    for batch in m.batches:
        for reads in HEADS: yield f'decoding, {reads}, batch {batch}', lambda: decoding(m, reads, batch)


def tried(work):
    """What a measurement gives, or why it gave nothing: the others go on, because a GPU may be
    there for minutes only"""
    try: return work()
    except Exception as e:
        traceback.print_exc()
        return dict(failed=f'{type(e).__name__}: {next(iter(str(e).splitlines()), "")}')


def measure(name, o, results):
    "Everything about one model; the file is written after each measurement"
    with tempfile.TemporaryDirectory() as folder:
        start, m = time.perf_counter(), subject(name, o, folder)
        found = results[name] = about(m, o)
        for what,work in measurements(m):
            found |= {what: tried(work), 'seconds': time.perf_counter() - start}
            o.out.write_text(json.dumps(results, indent=1) + '\n')
            print(f'{found["seconds"]:5.0f} s  {name}, {what}: {line(found[what])}', flush=True)


def line(result):
    "The figures of one measurement, but for those of single decoders"
    plain = {k: v for k,v in result.items() if not isinstance(v, dict)}
    return '  '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k,v in plain.items())


def main(o):
    "Measure the models, and return what failed"
    results = json.loads(o.out.read_text()) if o.out.exists() else {}
    for name in o.only: measure(name, o, results)
    return [f'{name}, {k}' for name in o.only
            for k,v in results[name].items() if isinstance(v, dict) and 'failed' in v]


def options(args=None):
    "The command line"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda', help='a torch device')
    parser.add_argument('--tiny', action='store_true',
                        help='tiny models and a few steps, to try the script')
    parser.add_argument('--only', nargs='+', choices=list(SHAPES), default=list(SHAPES),
                        help='the models to measure')
    parser.add_argument('--profile', default='embedded',
                        help="a section of settings.ini: SmolLM2's folder, texts and prompts")
    parser.add_argument('--out', type=Path, help='the file to write, or to add to; on a GPU benchmarks/gpu.json, if it is left out')
    parser.add_argument('--commit', help='the commit that is measured, where git cannot say it')
    o = parser.parse_args(args)
    if o.device != 'cpu' and not torch.cuda.is_available():
        parser.error(f'--device {o.device}: PyTorch finds no GPU here; try '
                     'the script with --device cpu --tiny')
    if not o.out:
        if o.device == 'cpu' or o.tiny: parser.error('name a file with --out: benchmarks/gpu.json is for what a GPU has found')
        o.out = Path(__file__).parent/'gpu.json'
    o.commit, o.dtype = o.commit or commit(), 'float32' if o.device == 'cpu' else 'bfloat16' # which a CPU imitates
    return o


if __name__ == '__main__':
    if failed := main(options()):
        sys.exit(f'gpu.py: no figure for {"; ".join(failed)}: the reasons are above')
