"Half precision everywhere, and a GPU where there is one"
import pytest, torch
from conftest import ROOT

from simpledeco.study.data import load_examples
from simpledeco.decode import attach, sampling
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model
from simpledeco.scan import scan

DEVICES = ['cpu'] + ['cuda']*torch.cuda.is_available()


def table_on(folder, device, dtype):
    model, tokenizer = load_model(ROOT/'models/smoke', dtype, device)
    return scan(model, tokenizer, load_examples(ROOT, 2, ['arithmetic', 'chat', 'facts']), folder, progress=False)


@pytest.mark.parametrize('device', DEVICES)
def test_scan_in_bfloat16_keeps_float32_statistics(tmp_path, device):
    full = table_on(tmp_path/'full', 'cpu', 'float32')
    half = table_on(tmp_path/'half', device, 'bfloat16')
    assert half['gap'].dtype == torch.float32
    assert half.take('hidden', torch.arange(3)).dtype == torch.bfloat16
    assert half.info['model'] == full.info['model'] and torch.equal(half['label'], full['label'])
    assert (half['gap'] - full['gap']).abs().median() < .1
    half.verify()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('reads', ['logits', 'hidden'])
def test_attached_head_divides_in_float32(device, dtype, reads):
    model, tokenizer = load_model(ROOT/'models/smoke', dtype, device)
    head = TemperatureHead(32, reads=reads, base_model=fingerprint(model)).eval()
    ids = tokenizer('The capital of France is', return_tensors='pt').input_ids.to(device)
    with torch.no_grad():
        base, hidden = model(ids).logits, model.base_model(ids).last_hidden_state
        with attach(model, head): divided = model(ids).logits
        T = head.temperature(head.live_inputs(hidden, base))
    assert T.dtype == divided.dtype == torch.float32
    torch.testing.assert_close(divided, base.float()/T[..., None])
    with attach(model, head):
        assert model.generate(ids, max_new_tokens=8, **sampling(head)).shape[1] > ids.shape[1]
