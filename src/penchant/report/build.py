from pathlib import Path
def write_report(run, output=None):
    p = Path(output or Path(run) / "report.html"); p.write_text("stub"); return p
