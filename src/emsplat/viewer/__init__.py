"""The live view: one local page of the runs below a folder, while they work and afterwards. Loads no torch.

`folders` finds the runs, `watched` follows each by its journal, `pictures` draws slices of maps, `compared` sets two
runs side by side. `site` says what is answered to whom, without a server; `serving` lets Tornado serve it. The page is
in ``assets``. Nothing here writes, and nothing but what emsplat itself names is ever read or sent.
"""
