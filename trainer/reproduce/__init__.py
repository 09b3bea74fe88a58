"""The paper's Tables 2 and 3 in miniature: data sets, rows, runs, and what may be concluded from them."""
