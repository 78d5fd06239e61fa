"""Debian's Chromium, without a window, and its driver: unpacked from Debian's packages where the machine has none."""

import os
import shutil
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from debian import NotHere, unpack

# With letters for Japanese answers.
PACKAGES = ("chromium", "chromium-driver", "fonts-noto-cjk")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-device-scale-factor=1")


class Browser:
    """Where the browser's programs are, and windows of it."""

    def __init__(self, folder: Path):
        if not shutil.which("apt-get"):
            raise NotHere("no apt-get: Chromium is taken from Debian's packages")
        self.folder = folder
        # Some machines have Google's, which is the same browser.
        self.program, self.driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
        self.env = {**os.environ, "HOME": str(folder)}
        if not (self.program and self.driver):
            usr = unpack(folder, PACKAGES) / "usr"
            self.program, self.driver = str(usr / "lib/chromium/chromium"), str(usr / "bin/chromedriver")
            libraries = usr / "lib/x86_64-linux-gnu"
            # fontconfig looks in fonts/ of the data folder.
            self.env |= {"LD_LIBRARY_PATH": f"{libraries}:{libraries}/pulseaudio", "XDG_DATA_HOME": str(usr / "share")}

    def window(self, width: int, height: int, scheme: str) -> webdriver.Chrome:
        """A window of this size that likes `scheme` (light or dark). Its logs hold all requests and what the console said."""
        options = Options()
        options.binary_location = self.program
        for flag in (*FLAGS, f"--user-data-dir={tempfile.mkdtemp(dir=self.folder)}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = webdriver.Chrome(options, Service(self.driver, env=self.env))
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        # A window has a least width; a phone is narrower.
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1,
                                                                      "mobile": width < 500})
        return driver
