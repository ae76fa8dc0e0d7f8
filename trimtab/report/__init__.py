"""The report: one HTML page about a run of a pipeline, with the graph before and after every pass.

::

    recorder = ReportRecorder("my model")
    trimtab.optimize(module, "cleanup,fuse", observers=[recorder])
    write_page("report.html", recorder)
"""

from trimtab.report.page import render_page, require_libraries, write_page
from trimtab.report.recorder import ReportRecorder

__all__ = ["ReportRecorder", "render_page", "require_libraries", "write_page"]
