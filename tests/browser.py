"A real browser for tests: headless Chromium, spoken to over its devtools protocol"
import itertools, json, shutil, subprocess, time

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
KEYS = dict(Tab=9, Escape=27, End=35, Home=36, ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40)


class Browser:
    "One page of a headless Chromium, until `close()`"
    def __init__(self, profile):
        if CHROMIUM is None: pytest.skip('there is no Chromium here')
        connect = pytest.importorskip('websocket').create_connection
        self.process = subprocess.Popen([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0',
                                         f'--user-data-dir={profile}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (said := self._address(profile/'DevToolsActivePort')):
            if self.process.poll() is not None: pytest.fail('Chromium does not start')
            time.sleep(.1)
        self.socket = connect('ws://127.0.0.1:{}{}'.format(*said), suppress_origin=True, http_no_proxy=['*'], timeout=300)
        self.numbers, self.events, self.session = itertools.count(1), [], None
        target = self.send('Target.createTarget', url='about:blank')['targetId']
        self.session = self.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log'): self.send(f'{domain}.enable')
        self.send('Emulation.setFocusEmulationEnabled', enabled=True) # also after the tab key has left a page
    def _address(self, file):
        lines = file.read_text().split() if file.exists() else []
        return lines if len(lines) == 2 else None
    def _receive(self):
        message = json.loads(self.socket.recv())
        if 'method' in message: self.events.append(message)
        return message
    def send(self, method, **params):
        "What a command of the protocol returns"
        number = next(self.numbers)
        self.socket.send(json.dumps(dict(id=number, method=method, params=params) | ({'sessionId': self.session} if self.session else {})))
        while (answer := self._receive()).get('id') != number: pass
        assert 'error' not in answer, (method, answer['error'])
        return answer['result']
    def open(self, address):
        "Load a page afresh"
        for url in ('about:blank', address):
            self.events.clear()
            self.send('Page.navigate', url=url)
            while not any(e['method'] == 'Page.loadEventFired' for e in self.events): self._receive()
    def js(self, code):
        "The value of an expression in the page"
        done = self.send('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in done, done['exceptionDetails']
        return done['result'].get('value')
    def key(self, name, **kw):
        "Press a key, as a person does"
        for kind in ('rawKeyDown', 'keyUp'):
            self.send('Input.dispatchKeyEvent', type=kind, key=name, code=name, windowsVirtualKeyCode=KEYS[name], **kw)
    def window(self, width=1200, height=800, scheme='light'):
        "The size of the window, and whether the system is light or dark"
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
    def errors(self):
        "What the page complained of since it was opened"
        bad = lambda e: (e['method'] == 'Runtime.exceptionThrown' or e['method'] == 'Log.entryAdded'
                         or e['method'] == 'Runtime.consoleAPICalled' and e['params']['type'] in ('error', 'warning', 'assert'))
        self.js('0') # what was said before has arrived
        return [e for e in self.events if bad(e)]
    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
