"What benchmarks/gpu.py measures on a GPU, run on a CPU with tiny models"
import json, sys

import pytest, torch
from conftest import ROOT

sys.path.insert(0, str(ROOT/'benchmarks'))
import gpu


def options(out, *more):
    return gpu.options(['--device', 'cpu', '--tiny', '--profile', 'smoke', '--out', str(out),
                        '--commit', 'abc', *more])


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "Both models, one after the other into one file"
    out = tmp_path_factory.mktemp('gpu')/'gpu.json'
    for name in gpu.SHAPES: assert gpu.main(options(out, '--only', name)) == []
    return json.loads(out.read_text())


def test_every_figure_is_there_for_both_models(results):
    steps = [f'decoding, {reads}, batch {b}' for reads in gpu.HEADS for b in gpu.SMALL['batches']]
    scans = ['pre-scan / bare forward', 'pre-scan in blocks of 16 rows / bare forward']
    assert list(results) == list(gpu.SHAPES)
    for found in results.values():
        assert (found['commit'], found['card'], found['tiny']) == ('abc', 'none: cpu', True)
        assert found['torch_version'] == torch.__version__
        for name in scans + steps:
            assert 0 < found[name]['lo'] <= found[name]['ratio'] <= found[name]['hi']
        assert all(found[name]['pairs'] == gpu.STEPS//2 for name in steps)
        assert found['whole scan']['rows'] > 0
        assert found['training, hidden']['steps'] == gpu.SMALL['steps']


def test_figures_that_depend_on_weights_are_those_of_real_weights(results):
    real, random = results.values()
    assert (real['weights'], random['weights']) == ('real', 'random')
    assert 'frontier' not in random and 'test_loss' not in random['training, logits']
    assert real['training, logits']['test_tokens'] > 0
    decoders = real['frontier']['decoders']
    assert list(decoders) == [*gpu.FRONTIER, 'EDT', 'judged, left out']
    assert 'excess' in decoders['judged, left out'] and 'excess' not in decoders['T = 1']
    assert all(0 <= d['accuracy']['mean'] <= 1 and 0 < d['diversity']['mean'] <= 1
               for d in decoders.values())


def test_a_random_model_reads_its_own_likely_tokens(tmp_path):
    m = gpu.subject(gpu.LLAMA, options(tmp_path/'x.json'), tmp_path)
    encoded = [(x['ids'], x['where']) for x in m.examples]
    stats = gpu._scan_batch(m.model, encoded, range(len(encoded)))
    assert {len(where) for _,where in encoded} == {m.answered}
    assert (stats['rank'] <= 64).float().mean() > .95 # but for rounding in bfloat16
    # the bare pass does the same work
    assert torch.equal(gpu.bare(m.model, encoded, 'cpu').float().amax(-1), stats['z_max'])


def test_the_blocks_of_a_gpu_change_no_statistics():
    z, labels = 3*torch.randn(50, 300), torch.randint(300, (50,))
    shipped = gpu.logits.token_statistics(z, labels)
    with gpu.patch.object(gpu.logits, '_partition', gpu.partial(gpu.logits._partition, rows=1024)):
        other = gpu.logits.token_statistics(z, labels)
    for k in shipped: torch.testing.assert_close(shipped[k], other[k])


def test_the_shapes_are_those_of_the_models():
    with torch.device('meta'):
        models = {k: gpu.AutoModelForCausalLM.from_config(gpu.LlamaConfig(**v))
                  for k,v in gpu.SHAPES.items()}
    assert {k: m.num_parameters()
            for k,m in models.items()} == {gpu.SMOLLM2: 134_515_008, gpu.LLAMA: 8_030_261_248}


def test_head_and_static_temperature_take_turns():
    assert [gpu.heads_turn([0]*n) for n in range(5, 9)] == [True, False, False, True]
    times = torch.tensor([[2., 1., 1., 2.]]*6).numpy() # a step with the head takes twice as long
    found = gpu.of_steps(times, 16)
    assert (found['ratio'], found['head_milliseconds'], found['cost_milliseconds']) == (.5, 2000, 1000)
    assert (found['head_tokens_per_second'], found['pairs']) == (8, 12)


def test_a_failure_is_a_line_and_not_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, 'measurements',
                        lambda m: [('broken', lambda: 1/0), ('whole', lambda: dict(seconds=1.))])
    o = options(tmp_path/'gpu.json', '--only', gpu.LLAMA)
    assert gpu.main(o) == [f'{gpu.LLAMA}, broken']
    found = json.loads(o.out.read_text())[gpu.LLAMA]
    assert found['broken'] == dict(failed='ZeroDivisionError: division by zero')
    assert found['whole'] == dict(seconds=1.)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_one_is_told_how_to_try_the_script(capsys):
    with pytest.raises(SystemExit): gpu.options([])
    assert 'finds no GPU here; try the script with --device cpu --tiny' in capsys.readouterr().err


def test_a_cpu_adds_nothing_to_the_figures_of_gpus(capsys):
    "Unless it is told a file"
    with pytest.raises(SystemExit): gpu.options(['--device', 'cpu', '--tiny'])
    assert 'name a file with --out: benchmarks/gpu.json is for what a GPU has found' in capsys.readouterr().err
