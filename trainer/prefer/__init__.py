"""The paper's human study: pairs of pictures, blind votes on a local page, a win rate with its interval."""
