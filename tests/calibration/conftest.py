"""What a page looks like is checked where a browser is installed (Debian: chromium)."""

from __future__ import annotations

import shutil

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
collect_ignore = [] if BROWSER else ["test_report_browser.py"]
