"""A page of this project in headless Chromium: for tests, and for the picture in the README.

python tests/browser.py .github/demo.png [seed=7] [theme=light] [ckpt_path=…]    solves maze 7 and takes the picture
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@contextmanager
def browser(width: int = 1660, height: int = 1000, theme: str = "light", motion: bool = False) -> Iterator:
    """A Selenium driver. Without `motion` the page is told that its reader wants none."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--disable-dev-shm-usage", "--hide-scrollbars", f"--window-size={width},{height}"):
        options.add_argument(word)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # it cannot make one for root
    if not motion:
        options.add_argument("--force-prefers-reduced-motion")
    if theme == "dark":
        options.add_argument("--force-dark-mode")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        # What the picture shows, without the window's own frame.
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )
        yield driver
    finally:
        driver.quit()


@contextmanager
def serving(server) -> Iterator[str]:
    """A server in the background; gives its address."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()


def until(driver, script: str, seconds: float = 30):
    """The value of a JavaScript expression as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := driver.execute_script(f"return {script}")):
        assert time.monotonic() < end, f"not within {seconds} s: {script}"
        time.sleep(0.02)
    return value


def main() -> None:
    from ctm.demo import SHIPPED, open_server

    path, *words = sys.argv[1:]
    given = dict(word.split("=", 1) for word in words)
    with serving(open_server(given.get("ckpt_path", SHIPPED), port=0)) as url, browser(theme=given.get("theme", "light"), height=int(given.get("height", 1000))) as driver:
        driver.get(f"{url}?seed={given.get('seed', 7)}")
        until(driver, "document.getElementById('maze').dataset.state === 'ready'")
        driver.execute_script("document.getElementById('solve').click()")
        until(driver, "document.getElementById('maze').dataset.state === 'solved'")
        if "tick" in given:
            driver.execute_script(f"show({int(given['tick'])} - 1)")
        time.sleep(0.3)
        height = driver.execute_script("return document.documentElement.scrollHeight")
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 1660, "height": height, "deviceScaleFactor": 1, "mobile": False})
        time.sleep(0.3)
        Path(path).write_bytes(driver.get_screenshot_as_png())
        print(driver.find_element("id", "say").text)
        for entry in driver.get_log("browser"):
            print(entry["message"])


if __name__ == "__main__":
    main()
