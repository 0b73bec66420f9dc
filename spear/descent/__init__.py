"""One layer beyond sampling, by descent: its gradient alone (`dictionary`), or coupled with its weights (`layer`)."""
