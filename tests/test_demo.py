"`simpledeco demo` in a real browser: two answers as their tokens come, and what is said when something is wrong"
import json, os, re, signal, socket, struct, subprocess, sys, threading, time
from pathlib import Path

import pytest
from browser import Browser
from conftest import ROOT, run

from simpledeco.conversations import prompt_ids
from simpledeco.demo import DemoServer, side_by_side
from simpledeco.head import TemperatureHead
from simpledeco.model import load_model

SHOWN = """[...document.querySelectorAll('.sd-a')].map(side => {
  const tokens = [...side.querySelectorAll('ruby')], copy = side.cloneNode(true)
  for (const x of copy.querySelectorAll('rt')) x.remove()
  return {T: tokens.map(x => x.querySelector('rt').textContent.trim()), text: copy.textContent.replaceAll('␣', ''),
          colours: new Set(tokens.map(x => x.style.borderColor)).size}
})"""
SUMS = "[...document.querySelectorAll('.sd-sum')].map(x => x.textContent)"
ASK = """(values => {
  const form = document.getElementById('ask')
  for (const k in values) form.elements[k].value = values[k]
  form.requestSubmit()
})(%s)"""
MODEL, MOST = ROOT/'models/embedded', 12


@pytest.fixture(scope='module')
def served():
    "The address of a demo with a ready head and the model of the study, as a user starts it"
    command = [Path(sys.executable).parent/'simpledeco', 'demo', 'smollm2-by-token', MODEL, '--port', '0', '--scale', '2',
               '--max-new-tokens', str(MOST)]
    interrupted = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # which a shell in the background ignores
    with subprocess.Popen(command, preexec_fn=interrupted, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                          env=dict(os.environ, PYTHONUNBUFFERED='1')) as process:
        try:
            said = process.stdout.readline()
            yield re.match(r'http://127\.0\.0\.1:\d+/', said)[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130 and process.stderr.read() == ''
        finally: process.kill()


@pytest.fixture(scope='module')
def page(served, tmp_path_factory):
    chromium = Browser(tmp_path_factory.mktemp('chromium'))
    chromium.window()
    chromium.open(served)
    yield chromium
    chromium.close()


def wait(page, condition):
    for _ in range(6000): # a busy machine is slow
        if page.js(condition): return
        time.sleep(.05)
    pytest.fail(f'{condition} did not come true')


def ask(page, prompt, temperature=1, scale=2, seed=0):
    page.js(ASK % json.dumps(dict(prompt=prompt, temperature=temperature, scale=scale, seed=seed)))
    wait(page, "document.getElementById('stop').hidden")


def test_the_page_shows_what_the_model_says_with_each_temperature(page):
    ask(page, 'Write a story about a lighthouse.', temperature=.7)
    static, own = page.js(SHOWN)
    model, tokenizer = load_model(MODEL)
    ids = prompt_ids(tokenizer, [[dict(role='user', content='Write a story about a lighthouse.')]])[0]
    events = list(side_by_side(model, tokenizer, TemperatureHead.from_pretrained('smollm2-by-token'), ids, .7, 2, MOST))
    for side,shown in enumerate((static, own)):
        mine = [(text, t) for s,text,t in events if s == side and text]
        assert shown['T'] == [f'{t:.1f}' for _,t in mine]
        assert shown['text'].split() == ''.join(text for text,_ in mine).split()
    assert static['colours'] == 1 < 5 < own['colours'] and set(static['T']) == {'0.7'}
    assert f'cut at {MOST} tokens' in page.js(SUMS)[1] and not page.errors()


def test_tokens_come_one_by_one_and_a_reader_may_stop_them(page):
    page.js(ASK % json.dumps(dict(prompt='Write a poem.', seed=1)))
    wait(page, "document.querySelectorAll('ruby').length > 3")
    assert not page.js("document.getElementById('stop').hidden")
    page.js("document.getElementById('stop').click()")
    count = page.js("document.querySelectorAll('ruby').length")
    assert 3 < count < 2*MOST and all('stopped' in x for x in page.js(SUMS))
    ask(page, 'What is the capital of France?') # and then the next is answered
    assert 'Paris' in page.js(SHOWN)[1]['text']


def test_markup_is_text(page):
    ask(page, '</script><script>document.title="owned"</script><img src=x onerror=alert(1)> Repeat this: <b>bold</b>')
    assert page.js('document.title') == 'simpledeco demo' and not page.js("document.querySelectorAll('.sd-a b, .sd-a img').length")
    assert page.js(SHOWN)[0]['T'] and not page.errors()


@pytest.mark.parametrize('prompt, scale, words', [
    ('word '*9000, 2, "tokens but the model's context is 8192"), ('Hi', 0.001, None), (' ', 2, None)])
def test_a_prompt_that_cannot_be_answered(page, prompt, scale, words):
    "The model's limits are said by the server; what a form forbids is not sent"
    page.open(page.js('location.href'))
    page.js(ASK % json.dumps(dict(prompt=prompt, scale=scale)))
    if words: wait(page, f"document.getElementById('said').textContent.includes({json.dumps(words)})")
    else: wait(page, "!document.getElementById('ask').checkValidity() || document.getElementById('said').textContent.includes('empty')")
    assert not page.js("document.querySelectorAll('ruby').length")


def test_enter_sends_and_on_a_phone_nothing_is_wider(page):
    page.window(360, 700, 'dark')
    page.open(page.js('location.href'))
    page.js("document.getElementById('ask').elements.prompt.value = 'What is 1 + 1?'; " +
            "document.getElementById('ask').elements.prompt.focus()")
    page.send('Input.dispatchKeyEvent', type='rawKeyDown', key='Enter', code='Enter', windowsVirtualKeyCode=13)
    wait(page, "document.getElementById('stop').hidden && document.querySelectorAll('ruby').length")
    assert page.js('document.documentElement.scrollWidth') <= 360 and not page.errors()
    page.window()


def test_it_listens_to_this_machine_alone(served):
    port = int(served.split(':')[-1].strip('/'))
    others = {x[4][0] for x in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {'127.0.0.1'}
    if not others: pytest.skip('this machine has no other address')
    for host in others:
        with pytest.raises(OSError): socket.create_connection((host, port), timeout=5)


def test_a_reader_who_leaves_before_the_page_has_come_is_not_a_fault(capfd):
    "As one does who opens the page while the model is being loaded, and closes it"
    with DemoServer(0) as server, socket.create_connection(server.server_address) as reader:
        server.show('x'*2**24, None, None, 1)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)) # what is on its way is thrown away
        reader.sendall(f'GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n'.encode())
        before = set(threading.enumerate())
        server.handle_request()
        reader.close()
        for t in set(threading.enumerate()) - before: t.join(30)
    assert capfd.readouterr().err == ''


def test_a_port_in_use_is_said_before_the_model_is_loaded(served):
    port = served.split(':')[-1].strip('/')
    done = run('simpledeco', 'demo', 'smollm2-by-token', 'no/such-model', '--port', port, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (1, '') and f'port {port} of 127.0.0.1 is in use' in done.stderr
