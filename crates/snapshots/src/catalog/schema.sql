-- The catalog, version 3. What each table means is in docs/formats/catalog.md.

CREATE TABLE groups (
    id      TEXT PRIMARY KEY,
    name    TEXT NOT NULL UNIQUE,
    owner   INTEGER NOT NULL,
    created INTEGER NOT NULL
) STRICT;

CREATE TABLE targets (
    id        TEXT PRIMARY KEY,
    name      TEXT NOT NULL,
    grp       TEXT NOT NULL REFERENCES groups (id),
    config    TEXT NOT NULL,
    machine   TEXT NOT NULL,
    uuid      TEXT NOT NULL,
    macs      TEXT NOT NULL,
    parent    TEXT REFERENCES snapshots (id),
    power     TEXT NOT NULL,
    process   TEXT,
    protected INTEGER NOT NULL DEFAULT 0,
    counter   INTEGER NOT NULL DEFAULT 0,
    created   INTEGER NOT NULL,
    removed   INTEGER,
    suspended TEXT
) STRICT;
CREATE UNIQUE INDEX target_names ON targets (name) WHERE removed IS NULL;

CREATE TABLE layers (
    id     TEXT PRIMARY KEY,
    grp    TEXT NOT NULL REFERENCES groups (id),
    file   TEXT NOT NULL,
    format TEXT NOT NULL,
    size   INTEGER NOT NULL,
    below  TEXT REFERENCES layers (id),
    depth  INTEGER NOT NULL,
    stamp  TEXT,
    settled TEXT,
    retired TEXT
) STRICT;
CREATE INDEX layers_below ON layers (below);

CREATE TABLE here_disks (
    target TEXT NOT NULL REFERENCES targets (id),
    disk   TEXT NOT NULL,
    layer  TEXT NOT NULL REFERENCES layers (id),
    PRIMARY KEY (target, disk)
) STRICT, WITHOUT ROWID;
CREATE INDEX here_disks_layer ON here_disks (layer);

CREATE TABLE snapshots (
    id         TEXT PRIMARY KEY,
    target     TEXT NOT NULL REFERENCES targets (id),
    parent     TEXT REFERENCES snapshots (id),
    name       TEXT NOT NULL,
    note       TEXT NOT NULL,
    created    INTEGER NOT NULL,
    undo_point INTEGER NOT NULL,
    keep       INTEGER NOT NULL,
    protected  INTEGER NOT NULL DEFAULT 0,
    machine    TEXT NOT NULL,
    config     TEXT NOT NULL,
    memory     TEXT,
    facts      TEXT NOT NULL,
    removed    INTEGER
) STRICT;
CREATE UNIQUE INDEX snapshot_names ON snapshots (target, name) WHERE removed IS NULL;
CREATE INDEX snapshots_parent ON snapshots (parent);

CREATE TABLE snapshot_disks (
    snapshot TEXT NOT NULL REFERENCES snapshots (id),
    disk     TEXT NOT NULL,
    layer    TEXT NOT NULL REFERENCES layers (id),
    PRIMARY KEY (snapshot, disk)
) STRICT, WITHOUT ROWID;
CREATE INDEX snapshot_disks_layer ON snapshot_disks (layer);

CREATE TABLE operations (
    seq     INTEGER PRIMARY KEY,
    id      TEXT NOT NULL UNIQUE,
    kind    TEXT NOT NULL,
    subject TEXT NOT NULL,
    target  TEXT,
    state   TEXT NOT NULL,
    plan    TEXT NOT NULL,
    undo    TEXT,
    started INTEGER NOT NULL,
    ended   INTEGER,
    error   TEXT
) STRICT;
CREATE INDEX operations_state ON operations (state);
