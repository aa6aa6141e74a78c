"""The baseline against an independent derivation in float64, its cheap form against the whole
vocabulary, and what a user sees when something does not fit"""
import math
from collections import Counter

import numpy as np, pytest, torch
from conftest import ROOT
from scipy.special import log_softmax, softmax

from simpledeco.study.autodeco import (AutoDeco, autodeco_loss, autodeco_rule, collapse,
                                       fit_autodeco, predict, temperature_loss, TempHead,
                                       token_columns, top_p_loss, TopPHead, train_once)
from simpledeco.evaluate import decoder_scores, mass_upto
from simpledeco.study.rivals import BUDGET, decompose, edt, fit_entropy_head, shuffled_within, tune
from simpledeco.study.data import load_examples
from simpledeco.model import load_model
from simpledeco.study.models import build_model
from simpledeco.scan import scan
from simpledeco.decode import top_p_filter
from simpledeco.sample import Step
from simpledeco.study.settings import load_profile
from simpledeco.table import TokenTable


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "A table of the smoke model, and its output embedding"
    p = load_profile('smoke', ROOT)
    model, tokenizer = load_model(build_model(p.model, ROOT/'models/smoke', p.sha256))
    return scan(model, tokenizer, load_examples(ROOT, 12, ['maths', 'chat']),
                tmp_path_factory.mktemp('table')/'t',
                progress=False), model.get_output_embeddings().weight.detach()


def some_tokens(seed, B=3, L=8, V=40):
    rng = np.random.default_rng(seed)
    logits, labels = 3*rng.normal(size=(B, L, V)), rng.integers(V, size=(B, L))
    right = rng.random((B, L - 1)) < .5
    labels[:, 1:] = np.where(right, logits[:, :-1].argmax(-1), labels[:, 1:])
    labels[0, :3] = labels[2, -1] = -100
    return logits, labels, rng.uniform(.05, 1.95, (B, L, 1)), rng.uniform(.05, .98, (B, L, 1))


def losses_by_numpy(logits, labels, T, P, weighted, dropped=()):
    """Both losses from the equations, one position at a time; `dropped` holds the positions that
    easy-token masking removes"""
    first, second = [], []
    for b in range(len(labels)):
        for i in range(labels.shape[1] - 1):
            y, z = labels[b, i + 1], logits[b, i]
            if y == -100: continue
            w = softmax(z)[y] if weighted else 1.
            if (b, i) not in dropped: first.append(-w*log_softmax(z/max(T[b, i, 0], .01))[y])
            p = softmax(z/T[b, i, 0])
            running = np.array([p[p > q].sum() + q for q in p])
            masked = p*np.exp(-30*np.maximum(running - P[b, i, 0], 0))
            second.append(-w*math.log(masked[y]/(masked.sum() + 1e-9) + 1e-9))
    return np.mean(first), np.mean(second)


@pytest.mark.parametrize('weighted', [True, False])
@pytest.mark.parametrize('seed', range(3))
def test_losses_and_gradients_agree_with_the_equations(seed, weighted):
    logits, labels, T, P = some_tokens(seed)
    expected = losses_by_numpy(logits, labels, T, P, weighted)
    t, q = (torch.tensor(x, requires_grad=True) for x in (T, P))
    z, y = torch.tensor(logits), torch.tensor(labels)
    a = temperature_loss(z, t, y, drop_easy=0, weighted=weighted)
    c = top_p_loss(z, t, q, y, weighted=weighted)
    np.testing.assert_allclose([a.item(), c.item()], expected, rtol=1e-9)
    (a + c).backward()
    for b,i in ((1, 2), (0, 4), (2, 0)): # slopes by central differences of the equations
        for x,grad in ((T, t.grad), (P, q.grad)):
            up, down = x.copy(), x.copy(); up[b, i] += 1e-6; down[b, i] -= 1e-6
            f = lambda x2: sum(losses_by_numpy(logits, labels, *((x2, P) if x is T else (T, x2)),
                                               weighted))
            np.testing.assert_allclose(grad[b, i, 0].item(), (f(up) - f(down))/2e-6, rtol=1e-4,
                                       atol=1e-7)
    assert t.grad[0, :2].abs().sum() == 0, 'ignored labels teach nothing'
    assert t.grad[:, -1].abs().sum() == 0, 'the last position teaches nothing'


def test_easy_token_masking_drops_easy_positions_of_the_first_loss_only():
    logits, labels, T, P = some_tokens(5)
    z, y, t, q = (torch.tensor(x) for x in (logits, labels, T, P))
    easy = {(b, i) for b in range(3) for i in range(7) if labels[b, i + 1] == logits[b, i].argmax()}
    assert easy
    all_gone = losses_by_numpy(logits, labels, T, P, True, easy)[0]
    assert temperature_loss(z, t, y, drop_easy=1.).item() == pytest.approx(all_gone, rel=1e-9)
    values = [temperature_loss(z, t, y, generator=torch.Generator().manual_seed(s)).item()
              for s in range(40)]
    assert len(set(values)) > 10, 'the default masks at random'
    assert top_p_loss(z, t, q, y).item() == pytest.approx(
        losses_by_numpy(logits, labels, T, P, True)[1], rel=1e-9)


def test_heads_by_numpy():
    torch.manual_seed(1)
    temp = TempHead(6).double()
    nucleus = TopPHead(6).double()
    h = torch.randn(5, 6).double()
    z = 2*torch.randn(5, 30).double()
    def mlp(m, x):
        w = [p.detach().numpy() for p in m.mlp.parameters()]
        return 1/(1 + np.exp(-(np.maximum(x @ w[0].T + w[1], 0) @ w[2].T + w[3])))
    T = 2*mlp(temp, h.numpy())
    p = softmax(z.numpy()/(T + 1e-8), axis=1)
    stats = np.stack([p.max(1), -(p*np.log(p + 1e-8)).sum(1), p.var(1, ddof=1),
                      np.sort(p)[:, -5:].sum(1)], 1)
    np.testing.assert_allclose(temp(h).detach().numpy(), T, rtol=1e-12)
    np.testing.assert_allclose(nucleus(h, temp(h).detach(), z).detach().numpy(),
                               mlp(nucleus, np.hstack([h.numpy(), T, stats])), rtol=1e-10)


@pytest.mark.parametrize('tricks', [dict(), dict(drop_easy=0, weighted=False), dict(paper=True)])
def test_cheap_form_has_the_gradient_of_the_whole_vocabulary(smoke, tricks):
    table, weight = smoke
    torch.manual_seed(0)
    heads = AutoDeco(table.info['hidden_size'])
    x = token_columns(table, torch.randperm(len(table))[:192])
    out = []
    for w in (weight, None):
        heads.zero_grad()
        loss = autodeco_loss(heads, x, w, generator=torch.Generator().manual_seed(3), **tricks)
        loss.backward()
        out.append((loss.item(), torch.cat([p.grad.flatten() for p in heads.parameters()]).double()))
    (a, g), (b, h) = out
    assert abs(a - b) < .01*abs(a) and (g - h).norm() < .05*g.norm()


def test_training_reduces_the_objective_and_is_repeatable(smoke):
    table, weight = smoke
    curve, kw = [], dict(lr=1e-3, steps=30, batch=32)
    heads = fit_autodeco(table, curve=curve, **kw)
    assert curve[-1]['objective'] < curve[0]['objective'] and curve[-1]['step'] == 30
    again = fit_autodeco(table, **kw)
    for p,q in zip(heads.parameters(), again.parameters()): assert torch.equal(p, q)


def test_of_hidden_states_and_logits_only_those_of_drawn_tokens_are_read(smoke, monkeypatch):
    "They are most of a table, which may be larger than the memory"
    table, taken, take = TokenTable(smoke[0].path), Counter(), TokenTable.take
    def counted(self, name, rows):
        taken[name] += len(rows)
        return take(self, name, rows)
    monkeypatch.setattr(TokenTable, 'take', counted)
    fit_autodeco(table, steps=3, batch=4)
    assert 0 < taken['hidden'] <= 12 < len(table)/10 and taken['top_logits'] == taken['hidden']
    assert not {'hidden', 'top_logits'} & set(table._columns), 'no whole column'


def test_saved_heads_decode_as_before(tmp_path, smoke):
    table, weight = smoke
    heads = fit_autodeco(table, steps=2, batch=8)
    heads.save_pretrained(tmp_path)
    assert {x.suffix for x in tmp_path.iterdir()} <= {'.safetensors', '.json', '.md'}
    loaded, rows = AutoDeco.from_pretrained(tmp_path).eval(), torch.arange(20)
    hidden = table.take('hidden', rows)
    T, P = predict(loaded, table, rows)
    assert torch.equal(T, predict(heads, table, rows)[0])
    step = Step(hidden, hidden @ weight.T, rows, rows, (hidden, hidden @ weight.T), {})
    torch.testing.assert_close(autodeco_rule(loaded, scale=2.)(step).amax(1),
                               (hidden @ weight.T).amax(1)/(2*T))
    q = autodeco_rule(loaded)(step).softmax(-1)
    full = (hidden @ weight.T/T[:, None]).double().softmax(-1)
    mass = (full*(q > 0)).sum(1)
    smallest = torch.where(q > 0, full, 2.).amin(1)
    assert (mass >= P - 1e-5).all(), 'the set reaches the mass'
    assert (mass - smallest < P + 1e-5).all(), 'it is the smallest that does'


def test_what_does_not_fit_is_named(smoke):
    table, weight = smoke
    with pytest.raises(ValueError, match='the output embedding is .* pass the weight of its own model'):
        fit_autodeco(table, output_weight=weight[:, :8], steps=1)
    with pytest.raises(ValueError, match='the heads were trained for base model other'):
        predict(AutoDeco(table.info['hidden_size'], base_model='other'), table, torch.arange(3))
    with pytest.raises(ValueError, match=f'every method is tuned with {BUDGET}'):
        tune([dict(t=1.)], lambda t: 0.)


def test_an_absurd_learning_rate_counts_as_a_collapse(smoke):
    job = dict(table=smoke[0].path, corpora=None, steps=30, batch=16, seed=0, min_p=.1, risk=.05)
    for method in ('AutoDeco', 'ours'):
        sound, absurd = (train_once(job | dict(method=method, lr=lr)) for lr in (1e-4, 1.))
        assert collapse(sound[0], sound[-1]) == '' and collapse(absurd[0], absurd[-1]) != ''


def test_scores_of_decoders_by_sampling(smoke):
    "The expected probability of the true token is the share of samples that hit it"
    table, weight = smoke
    rows = torch.arange(0, len(table), 7)[:40]
    hidden, y, T = table.take('hidden', rows), table['label'][rows].long(), torch.linspace(.02, .2, 40)
    z = hidden @ weight.T/T[:, None]
    P = torch.linspace(.3, .9, 40)
    for kw,kept in ((dict(top_p=P), top_p_filter(z, P)),
                    (dict(min_p=.1),
                     z.masked_fill(z < z.amax(1, keepdim=True) + math.log(.1), -torch.inf))):
        q = kept.double().softmax(1)
        s = decoder_scores(T, table, rows, **kw)
        inside = (q > 0).sum(1) < 128
        assert inside.sum() > 5
        expected = 2*q.gather(1, y[:, None])[:, 0] - (q**2).sum(1)
        torch.testing.assert_close(s['quadratic'].double()[inside], expected[inside], atol=1e-3,
                                   rtol=1e-2)


def test_decomposition_adds_up_and_punishes_noise(smoke):
    table, _ = smoke
    rows = torch.arange(min(300, len(table)))
    noisy = .5 + torch.rand(len(rows), generator=torch.Generator().manual_seed(0))
    parts = decompose(noisy, table, rows)
    torch.testing.assert_close(parts['gain'], parts['mean_shift'] + parts['residual'])
    torch.testing.assert_close(parts['residual'], parts['alignment'] - parts['penalty'])
    assert (parts['penalty'] > -1e-6).all() and parts['penalty'].mean() > 0
    assert decompose(torch.full((len(rows),), .8), table, rows)['penalty'].abs().max() < 1e-9


def test_controls_keep_what_they_should():
    generator = torch.Generator().manual_seed(0)
    H, T = 3*torch.rand(1000, generator=generator), torch.rand(1000, generator=generator)
    within = shuffled_within(T, H, bins=5)
    for part in H.argsort().chunk(5): assert sorted(within[part].tolist()) == sorted(T[part].tolist())
    assert (edt(H.sort().values, .9, 2.).diff() >= 0).all() and edt(H, .9, 2.).max() < .9
    assert edt(H[:1], .9, 2.).item() == pytest.approx(.9*.8**(2/H[0].item()))
    gap = H*torch.rand(1000, generator=generator)*3
    head = fit_entropy_head(gap, H, min_p=.1, risk=.2)
    said = head(H)
    for value in said.unique():
        part = said == value # one bin
        assert abs((gap[part]/math.log(10) > value).float().mean() - .2) <= 1/part.sum()


def test_gradients_stay_finite_where_the_true_token_is_all_but_impossible():
    "A cold temperature makes the probability of a far token vanish; its slope must not overflow"
    generator = torch.Generator().manual_seed(0)
    top = (-torch.rand(50, 128, generator=generator).mul(20)).sort(descending=True).values
    top = top - top[:, :1]
    gap, T = torch.linspace(21, 60, 50), torch.linspace(.05, 1.9, 50).requires_grad_()
    x = top.exp().sum(1).log()
    own, upto, _ = mass_upto(T, gap, torch.full((50,), 3000), top, x)
    (own + upto).sum().backward()
    assert torch.isfinite(T.grad).all() and (upto <= 1).all()
