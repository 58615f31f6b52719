"""A page of this project in headless Chromium: for tests, and for the picture in the README.

python tests/browser.py .github/demo.png [seed=7] [theme=light] [tick=…] [ckpt_path=…]    solves maze 7, takes a picture
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
WIDTH = 1660


@contextmanager
def browser() -> Iterator:
    """A Selenium driver of headless Chromium. Its pages are told that their reader wants no motion."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium makes none for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        size(driver, 1000)
        media(driver)
        yield driver
    finally:
        driver.quit()


def size(driver, height: int) -> None:
    """The page's own size, without the frame of a window."""
    metrics = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def media(driver, theme: str = "light", motion: str = "reduce") -> None:
    """What the page is told of its reader's wishes."""
    wishes = {"prefers-color-scheme": theme, "prefers-reduced-motion": motion}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@contextmanager
def serving(server) -> Iterator[str]:
    """A server in the background; gives its address."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()


def until(driver, script: str, seconds: float = 60):
    """The value of a JavaScript expression as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := driver.execute_script(f"return {script}")):
        assert time.monotonic() < end, f"not within {seconds} s: {script}"
        time.sleep(0.02)
    return value


def main() -> None:
    from ctm.demo import SHIPPED, open_server

    target, *words = sys.argv[1:]
    given = {"seed": "7", "theme": "light", "ckpt_path": SHIPPED} | dict(word.split("=", 1) for word in words)
    with serving(open_server(given["ckpt_path"], port=0)) as url, browser() as driver:
        media(driver, given["theme"])
        driver.get(f"{url}?seed={given['seed']}")
        until(driver, "document.getElementById('maze').dataset.state === 'ready'")
        driver.find_element("id", "solve").click()
        until(driver, "document.getElementById('maze').dataset.state === 'solved'")
        if "tick" in given:
            driver.execute_script(f"show({int(given['tick'])} - 1)")
        size(driver, driver.execute_script("return document.documentElement.scrollHeight"))
        time.sleep(0.5)  # it is painted anew
        Path(target).write_bytes(driver.get_screenshot_as_png())
        print(driver.find_element("id", "say").text)


if __name__ == "__main__":
    main()
