"""A conversion from one checkpoint folder to another: planned, done by several processes, stopped and gone on with.

    plan(request)     find and open the source, plan the folder, name it by an id               planning.py
    check the place   names, free disk, what is there already                                   place.py
    OUT.partial/      lock.json, journal.jsonl: the id, then a line for each finished file      journal.py
                      .marks/: how far unfinished files are, every 32 MiB                       marks.py
    workers           master test, then whole files each, values looked at in passing           crew, work, look.py
    finish            small files, copies, what was done and found; then renamed to OUT         convert.py, record.py

Nothing here prints. Bytes do not depend on the number of workers, nor on how often the job was killed.
"""
