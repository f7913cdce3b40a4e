"""A real browser for tests of HTML pages, headless."""

import os
import shutil

import pytest


def _missing(what):
    """In CI a browser is there, and a test that is skipped would go unnoticed."""
    (pytest.fail if "CI" in os.environ else pytest.skip)(f"{what} is not installed")


def open_browser(folder):
    """Open Chromium with a profile in a folder, or skip the test if it is not installed."""
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        _missing("selenium")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver_path = shutil.which("chromedriver")
    if not chromium or not driver_path:
        _missing("Chromium or chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={folder}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(driver_path))


def show(browser, address, width=1280, scheme="light"):
    """Open a page with a width and a colour scheme, and wait until it is drawn."""
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_feature]})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address)
    wait_until_drawn(browser)


def wait_until_drawn(browser):
    """Wait until the page says that it is drawn."""
    from selenium.webdriver.support.wait import WebDriverWait

    drawn = "return 'drawn' in document.documentElement.dataset"
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(drawn))
