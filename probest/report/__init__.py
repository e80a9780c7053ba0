"""What an estimate looks like: in a terminal, in a notebook, as pictures and as data.

Import the module that is wanted (``probest.report.plots`` and so on); this package imports nothing by itself.
"""
