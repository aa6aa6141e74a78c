"""Bad input in quantity: the outcome is a right result or an error of our own that names the cause,
never a wrong number and never an error from the depths.

An error counts as our own when simpledeco itself raised it: the last frame of its traceback lies in
the package.
"""
import json, math, os, shutil, tempfile, traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest, torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax

from simpledeco.study.corpora import CORPORA
from simpledeco.decode import min_p_filter
from simpledeco.study.hub import hub_corpus, SCHEMAS
from simpledeco.loss import minimum_sufficient_hinge, required_temperature, self_quantile_temperature
from simpledeco.model import load_model
from simpledeco.study.models import build_model
from simpledeco.logits import GRID, token_statistics
from simpledeco.scan import scan
from simpledeco.checks import check_fraction
from simpledeco.study.settings import check_params, load_params, load_profile, PARAM_KEYS

# inputs for each test; `make faults` asks for many
MANY = int(os.environ.get('SIMPLEDECO_EXAMPLES', 40))
TRIED = Counter()
often = settings(max_examples=MANY, deadline=None, derandomize=True,
                 suppress_health_check=list(HealthCheck), database=None)


def outcome(name, f, *args, **kw):
    "('ok', result) or ('refused', message); anything else fails"
    try: result = 'ok', f(*args, **kw)
    except (ValueError, OSError) as e:
        last = Path(traceback.extract_tb(e.__traceback__)[-1].filename)
        assert last.parent.name == 'simpledeco', f'{type(e).__name__} from {last}: {e}'
        assert len(str(e)) > 15
        result = 'refused', str(e)
    TRIED[name, result[0]] += 1
    return result


@pytest.fixture(scope='module', autouse=True)
def report():
    yield
    if MANY > 100:
        tried = {', '.join(k): v for k,v in sorted(TRIED.items())}
        found = json.dumps(dict(inputs=sum(TRIED.values()), **tried), indent=1)
        (ROOT/'benchmarks/bad_input.json').write_text(found + '\n')


@pytest.fixture(scope='module')
def smoke():
    p = load_profile('smoke', ROOT)
    return load_model(build_model(p.model, ROOT/'models/smoke', p.sha256))


junk = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=8),
                 st.lists(st.integers(), max_size=2))


@often
@given(st.dictionaries(st.sampled_from(['risk', 'min_p', 'lr', 'steps', 'seed']),
                       st.floats(0, 1.2) | st.integers(0, 2), max_size=3)
       | st.dictionaries(st.sampled_from([*PARAM_KEYS, 'rsik', '']), junk, max_size=2),
       st.sets(st.sampled_from([*PARAM_KEYS]), max_size=1))
def test_parameters(changed, dropped):
    params = {k: v for k,v in (load_params(ROOT) | changed).items() if k not in dropped}
    kind, got = outcome('parameters', check_params, params, list(CORPORA))
    if kind == 'ok':
        assert 0 < got['risk'] < 1 and 0 < got['min_p'] < 1 and 0 < got['lr'] < math.inf
        assert set(got) == set(PARAM_KEYS)


@often
@given(st.sampled_from(['settings.ini', 'params.yaml']), st.data())
def test_settings_files(name, data):
    "A line is cut, doubled, replaced or broken"
    lines = (ROOT/name).read_text().splitlines()
    i = data.draw(st.integers(0, len(lines) - 1))
    lines[i] = data.draw(st.one_of(st.just(lines[i] + '\n' + lines[i]), st.just(lines[i][:5]),
                                   st.text(max_size=12), st.just(lines[i].replace('=', '= -')),
                                   st.just(lines[i].replace(':', ': ['))))
    with tempfile.TemporaryDirectory() as tmp:
        for f in ('settings.ini', 'params.yaml'): shutil.copy(ROOT/f, tmp)
        (Path(tmp)/name).write_text('\n'.join(lines), encoding='utf-8', errors='surrogatepass')
        kind, p = outcome(name, load_profile, 'embedded', tmp)
        if kind == 'ok': assert min(p.max_examples, p.batch_tokens, p.shard_examples, p.max_tokens) > 0
        kind, params = outcome(name, load_params, tmp)
        if kind == 'ok': outcome(name, check_params, params, list(CORPORA))


text = st.one_of(st.text(max_size=20),
                 st.sampled_from(['', ' ', '\n', '🙂'*30, 'é́', '<|im_end|>',
                                  '<|im_start|>assistant\n', '\ud800', '\x00', 'long '*3000, 'x']))
roles = st.sampled_from(['user', 'assistant', 'system', 'tool', ''])
message = (st.fixed_dictionaries(dict(role=roles, content=text)) | junk
           | st.fixed_dictionaries(dict(role=st.just('user'))))
pair = lambda a, b: [dict(role='user', content=a), dict(role='assistant', content=b)]
fine = st.builds(pair, text, text)
talk = st.one_of(fine, fine, fine, st.builds(lambda s, xs: [dict(role='system', content=s), *xs],
                                             text, fine), st.lists(message, max_size=4) | junk)


@often
@given(st.lists(talk, min_size=0, max_size=3), st.sampled_from([None, None, 1, 40]))
def test_conversations(smoke, talks, max_tokens):
    """Empty, one token, emoji, very long, no assistant, system only, broken: a table that agrees
    with the model, or a refusal that leaves nothing behind"""
    model, tokenizer = smoke
    examples = [dict(id=f'x{i}', corpus='c', split='train', group=f'g{i}', messages=m)
                for i,m in enumerate(talks)]
    with tempfile.TemporaryDirectory() as tmp:
        kind, table = outcome('conversations', scan, model, tokenizer, examples, Path(tmp)/'t',
                              max_tokens=max_tokens, progress=False)
        if kind == 'refused': assert not (Path(tmp)/'t').exists(), 'something was written'
        for i,x in enumerate(examples if kind == 'ok' else []):
            rows = (table['example'] == i).nonzero()[:, 0]
            ids = tokenizer(tokenizer.apply_chat_template(x['messages'], tokenize=False),
                            add_special_tokens=False, return_tensors='pt').input_ids[0]
            for r in rows[:2].tolist():
                at = table['position'][r].item()
                # pieces are tokenised one by one, which need not agree further on
                if at < len(ids) and torch.equal(ids[at], table['label'][r].long()):
                    with torch.inference_mode(): z = model(ids[None, :at]).logits[0, -1]
                    torch.testing.assert_close(table['z_true'][r], z[ids[at]], atol=1e-2, rtol=1e-3)


@often
@given(st.integers(1, 300), st.integers(0, 5),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.data())
def test_logits(V, N, dtype, data):
    """Any vocabulary, any float type, ties, masked entries, huge values, NaN: the float64 answer,
    or a refusal exactly when there is none"""
    draw = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    z = draw.normal(size=(N, V))*data.draw(st.sampled_from([0, .01, 1, 50, 1000]))
    for value in data.draw(st.lists(st.sampled_from([-np.inf, np.inf, np.nan, 0, 5, -6e4]),
                                    max_size=3)):
        z[draw.random((N, V)) < .1] = value
    labels = torch.tensor(draw.integers(-1 if data.draw(st.booleans()) else 0,
                                        V + data.draw(st.integers(0, 1)), N))
    z = torch.tensor(z).to(dtype)
    kind, got = outcome('logits', token_statistics, z, labels)
    good = bool(((labels >= 0) & (labels < V)).all())
    z64 = z.double().numpy()
    good = (good and not np.isnan(z64).any() and not (z64 == np.inf).any()
            and bool(np.isfinite(z64[np.arange(N), labels]).all()))
    # nor is a masked token among the largest
    good = good and bool(np.isfinite(np.sort(z64, 1)[:, ::-1][:, :128]).all())
    assert (kind == 'ok') == good, got
    if not good: return
    for i,y in enumerate(labels.tolist()):
        row = z64[i]
        assert got['rank'][i] == 1 + (row > row[y]).sum()
        x = row - row.max()
        np.testing.assert_allclose(got['log_z'][i].numpy(),
                                   [logsumexp(np.maximum(x/t, -1e4)) for t in GRID], rtol=1e-4,
                                   atol=1e-4)
        p = softmax(x)
        np.testing.assert_allclose(got['entropy'][i].item(), -(p[p > 0]*np.log(p[p > 0])).sum(),
                                   rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(got['top_logits'][i].double().numpy(), np.sort(row)[::-1][:128])


@often
@given(st.lists(st.floats(0, 100, width=32), max_size=6) | st.lists(st.floats(width=32), max_size=6),
       st.floats() | st.floats(.01, .99), st.floats() | st.floats(.01, .99),
       st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6))
def test_loss(gaps, min_p, risk, T):
    gap, T = torch.tensor(gaps, dtype=torch.float32), torch.tensor(T[:len(gaps)], dtype=torch.float32)
    kind, value = outcome('loss', minimum_sufficient_hinge, T, gap, min_p=min_p, risk=risk,
                          reduction='none')
    good = 0 < min_p < 1 and 0 < risk < 1 and all(math.isfinite(g) and g >= 0 for g in gaps)
    assert (kind == 'ok') == good
    if good and 1e-3 < min_p < .999: # close to 1, log(1/min_p) has few digits left in the argument itself
        m = -math.log(min_p)
        np.testing.assert_allclose(value.double().numpy(),
                                   [risk*t + max(0, g/m - t) for g,t in zip(gap.tolist(), T.tolist())],
                                   rtol=1e-4, atol=1e-4)


@often
@given(st.integers(1, 200), st.floats(.01, .99), st.floats(.01, .99), st.integers(0, 10**6))
def test_samplers(V, min_p, risk, seed):
    """The filter keeps what float64 keeps, ties and masked entries included; the training-free
    temperature keeps the nucleus and no more"""
    z = torch.tensor(np.random.default_rng(seed).normal(size=(3, V)).round(2)*3)
    z[1, seed % V:] = z[1, seed % V]
    if V > 1: z[2, seed % V] = -torch.inf
    kind, kept = outcome('samplers', min_p_filter, z, min_p)
    p = softmax(z.numpy(), axis=1)
    edge = np.abs(p/p.max(1, keepdims=True) - min_p) > 1e-9
    assert kind == 'ok'
    assert (np.isfinite(kept.numpy()) == (p >= min_p*p.max(1, keepdims=True)))[edge].all()
    kind, T = outcome('samplers', self_quantile_temperature, z, min_p=min_p, risk=risk)
    assert kind == 'ok' and torch.isfinite(T).all() and (T >= 0).all()
    for row,t in zip(z.numpy(), T.tolist()):
        inside = row.max() - row <= t*math.log(1/min_p) + 1e-4
        assert softmax(row)[inside].sum() >= 1 - risk - 1e-5


row = st.dictionaries(st.sampled_from(sorted({c for s in SCHEMAS.values() for c in s.columns})),
                      junk | st.lists(message, max_size=2) | st.just(dict(value='a', aliases=['b'])),
                      max_size=7)


@often
@given(st.sampled_from(sorted(SCHEMAS)), st.lists(row, max_size=3))
def test_rows_of_the_hub(name, rows):
    "Rows of any shape, and files that are cut off"
    with tempfile.TemporaryDirectory() as tmp:
        body = ''.join(json.dumps(r) + '\n' for r in rows)
        (Path(tmp)/f'{SCHEMAS[name].train}.jsonl').write_text(body[:-3] if len(rows) == 2 else body)
        kind, examples = outcome('rows of the hub', hub_corpus, name, tmp, 5)
        if kind == 'ok': assert all(m['content'].strip() for x in examples for m in x['messages'])


@pytest.mark.parametrize('value',
                         [0, 1, -1, 2, float('nan'), float('inf'), True, None, '0.5', [], 1 + 0j])
def test_fractions(value):
    assert outcome('fractions', check_fraction, 'risk', value)[0] == 'refused'
    assert outcome('fractions', required_temperature, torch.ones(2), value)[0] == 'refused'
