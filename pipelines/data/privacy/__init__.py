"""Personal data out of text: find it, check it, put a typed surrogate in its place.

`scrub.Scrubber` is the door. Behind it, `view` shows a text as the finders see it, each of
`contact`, `payment`, `national_ids`, `network`, `secret_keys`, `birth` and `addresses` finds some
types, `spans` settles who wins where finds overlap, and `surrogates` writes what stands instead.
`showing` is what a person may see of a text as it came.

No value that was found is kept, logged or part of an error: a span is a type and two offsets.
"""
