//! The rules that keep the code's two sides apart (ARCHITECTURE.md has the module table). They are read off the sources,
//! so this test needs nothing but the standard library and no build of the extension.
//!
//! A new arrow between modules is a decision: change the table here and in ARCHITECTURE.md in the same commit.

use std::fs;
use std::path::{Path, PathBuf};

/// Module of `src/` → the other modules it may name.
const ARROWS: [(&str, &[&str]); 14] = [
    ("pg", &[]),
    ("catalog", &["pg"]),
    ("views", &["catalog", "pg"]),
    ("projects", &["catalog", "pg"]),
    ("ingest", &["views", "catalog", "pg"]),
    ("tiers", &["ingest", "catalog", "pg"]),
    ("files", &["ingest", "catalog", "pg"]),
    ("sources", &["catalog", "pg"]),
    ("outbox", &["sources", "ingest", "catalog", "pg"]),
    ("fdw", &["files", "ingest", "catalog", "pg"]),
    ("query", &["catalog", "pg"]),
    (
        "product",
        &[
            "query", "fdw", "tiers", "ingest", "projects", "views", "catalog", "pg",
        ],
    ),
    (
        "workers",
        &[
            "product", "query", "outbox", "sources", "files", "fdw", "tiers", "ingest", "projects",
            "views", "catalog", "pg",
        ],
    ),
    // The tests inside a server: like workers, they run steps of every module.
    (
        "tests",
        &[
            "projects", "ingest", "tiers", "fdw", "workers", "catalog", "pg",
        ],
    ),
];

/// Crate → the crates of this workspace it may depend on.
const CRATE_ARROWS: [(&str, &[&str]); 7] = [
    ("event", &[]),
    ("lake", &["event"]),
    ("engine", &["event", "lake"]),
    ("mappers", &["event"]),
    ("files", &["event", "lake"]),
    ("sources", &["event", "lake", "files"]),
    ("iceberg", &["event", "lake"]),
];

/// Where PostgreSQL's own interface may be named: the audited layer, and the callbacks of the wrapper and the workers.
const UNSAFE_ZONES: [&str; 3] = ["pg", "fdw", "workers"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The files below a folder with this suffix, in a fixed order.
fn files(folder: &Path, suffix: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.to_string_lossy().ends_with(suffix) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// A Rust file's lines of code, numbered from 1, without comments.
fn code(path: &Path) -> Vec<(usize, String)> {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines()
        .enumerate()
        .map(|(index, line)| {
            (
                index + 1,
                line.split("//").next().unwrap_or_default().to_owned(),
            )
        })
        .filter(|(_, line)| !line.trim().is_empty())
        .collect()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether the line has `word` with no letter, digit or `_` beside it.
fn names(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(is_word)
            && !line[at + word.len()..].chars().next().is_some_and(is_word)
    })
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root())
        .unwrap_or(path)
        .display()
        .to_string()
}

/// The modules that a file reaches by `crate::`, groups (`crate::{a, b::c}`) included, with their lines.
fn reached(path: &Path) -> Vec<(usize, String)> {
    let text: Vec<(usize, String)> = code(path);
    let mut found = Vec::new();
    for (index, (number, line)) in text.iter().enumerate() {
        for (at, _) in line.match_indices("crate::") {
            if line[..at].chars().next_back().is_some_and(is_word) {
                continue;
            }
            let rest = &line[at + "crate::".len()..];
            if let Some(group) = rest.strip_prefix('{') {
                let mut whole = group.to_owned();
                for (_, next) in &text[index + 1..] {
                    if whole.matches('}').count() > whole.matches('{').count() {
                        break;
                    }
                    whole.push_str(next);
                }
                found.extend(top_level_names(&whole).map(|name| (*number, name)));
            } else {
                found.push((*number, rest.chars().take_while(|c| is_word(*c)).collect()));
            }
        }
    }
    found
}

/// The first segment of each member of a `use` group; `group` begins after its brace.
fn top_level_names(group: &str) -> impl Iterator<Item = String> {
    let mut depth = 0;
    let mut names = vec![String::new()];
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(String::new()),
            c if depth == 0 => names.last_mut().expect("never empty").push(c),
            _ => {}
        }
    }
    names
        .into_iter()
        .map(|name| {
            name.trim()
                .chars()
                .take_while(|c| is_word(*c))
                .collect::<String>()
        })
        .filter(|name| !name.is_empty())
}

fn assert_none(rule: &str, broken: &[String]) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

#[test]
fn crates_never_name_pgrx() {
    let mut broken = Vec::new();
    for path in files(&root().join("crates"), ".rs") {
        for (number, line) in code(&path) {
            if names(&line, "pgrx") || names(&line, "pg_sys") {
                broken.push(format!("{}:{number}: {}", shown(&path), line.trim()));
            }
        }
    }
    for path in files(&root().join("crates"), "Cargo.toml") {
        let text = fs::read_to_string(&path).expect("a manifest is readable");
        broken.extend(
            text.lines()
                .filter(|l| names(l, "pgrx"))
                .map(|l| format!("{}: {l}", shown(&path))),
        );
    }
    assert_none("the pure crates never link PostgreSQL", &broken);
}

#[test]
fn crates_forbid_unsafe_code() {
    let broken: Vec<String> = files(&root().join("crates"), "src/lib.rs")
        .iter()
        .filter(|path| {
            !code(path)
                .iter()
                .any(|(_, line)| line.trim() == "#![forbid(unsafe_code)]")
        })
        .map(|path| shown(path))
        .collect();
    assert_none("each crate forbids unsafe code", &broken);
}

#[test]
fn crates_depend_as_in_the_table() {
    let mut broken = Vec::new();
    for path in files(&root().join("crates"), "Cargo.toml") {
        let Some(name) = path
            .parent()
            .and_then(Path::file_name)
            .map(|n| n.to_string_lossy().into_owned())
        else {
            continue;
        };
        let Some((_, allowed)) = CRATE_ARROWS.iter().find(|(owner, _)| *owner == name) else {
            broken.push(format!("crates/{name} is not in the table"));
            continue;
        };
        let text = fs::read_to_string(&path).expect("a manifest is readable");
        for line in text.lines().filter(|line| line.starts_with("rakam-")) {
            let used: String = line["rakam-".len()..]
                .chars()
                .take_while(|c| is_word(*c))
                .collect();
            if !allowed.contains(&used.as_str()) {
                broken.push(format!("crates/{name} depends on {used}"));
            }
        }
    }
    assert_none("the crates' dependencies are those of the table", &broken);
}

/// The packages of a lock file: name and version, one a line in the order of the file.
fn locked(path: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join(path)).expect("a lock file is readable");
    let value = |line: &str| line.split('"').nth(1).unwrap_or_default().to_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines
        .windows(2)
        .filter(|pair| pair[0].starts_with("name = ") && pair[1].starts_with("version = "))
        .map(|pair| format!("{} {}", value(pair[0]), value(pair[1])))
        .collect()
}

#[test]
fn fuzz_targets_are_built_of_the_same_versions() {
    // What only the targets need.
    const OWN: [&str; 3] = ["arbitrary ", "libfuzzer-sys ", "rakam-fuzz "];
    let ours = locked("Cargo.lock");
    let broken: Vec<String> = locked("fuzz/Cargo.lock")
        .into_iter()
        .filter(|package| !OWN.iter().any(|own| package.starts_with(own)))
        .filter(|package| !ours.contains(package))
        .collect();
    assert_none("fuzz/Cargo.lock has the versions of Cargo.lock", &broken);
}

#[test]
fn modules_point_as_in_the_table() {
    let mut broken = Vec::new();
    for path in files(&root().join("src"), ".rs") {
        let inside = path
            .strip_prefix(root().join("src"))
            .expect("a file of src");
        // The root only lists the modules; the binary is pgrx's.
        if inside == Path::new("lib.rs") || inside.starts_with("bin") {
            continue;
        }
        let module = inside
            .components()
            .next()
            .map(|c| c.as_os_str().to_string_lossy().into_owned());
        let module = module.unwrap_or_default();
        let module = module.trim_end_matches(".rs");
        let Some((_, allowed)) = ARROWS.iter().find(|(owner, _)| *owner == module) else {
            broken.push(format!(
                "{}: module {module} is not in the table",
                shown(&path)
            ));
            continue;
        };
        for (number, target) in reached(&path) {
            let known = ARROWS.iter().any(|(name, _)| *name == target);
            if known && target != module && !allowed.contains(&target.as_str()) {
                broken.push(format!(
                    "{}:{number}: {module} points to {target}",
                    shown(&path)
                ));
            }
        }
    }
    assert_none("the arrows between modules are those of the table", &broken);
}

#[test]
fn the_table_has_no_circle() {
    // Each module points only to modules that are listed before it.
    for (index, (module, allowed)) in ARROWS.iter().enumerate() {
        for target in *allowed {
            assert!(
                ARROWS[..index].iter().any(|(name, _)| name == target),
                "{module} points to {target}, which is not listed before it"
            );
        }
    }
}

#[test]
fn the_servers_interface_stays_in_its_zones() {
    let mut broken = Vec::new();
    for path in files(&root().join("src"), ".rs") {
        let inside = path
            .strip_prefix(root().join("src"))
            .expect("a file of src");
        if UNSAFE_ZONES.iter().any(|zone| inside.starts_with(zone)) {
            continue;
        }
        for (number, line) in code(&path) {
            if names(&line, "pg_sys") || names(&line, "unsafe") {
                broken.push(format!("{}:{number}: {}", shown(&path), line.trim()));
            }
        }
    }
    assert_none(
        "pg_sys and unsafe code are in src/pg and the callbacks of src/fdw and src/workers only",
        &broken,
    );
}

#[test]
fn every_file_says_what_it_is() {
    let mut broken = Vec::new();
    for folder in ["src", "crates", "tests"] {
        for path in files(&root().join(folder), ".rs") {
            let text = fs::read_to_string(&path).expect("a source file is readable");
            // pgrx's binary is one macro call; test modules of a file are described by the file they belong to.
            if path.ends_with("bin/pgrx_embed.rs") || path.ends_with("tests.rs") {
                continue;
            }
            let first = text
                .lines()
                .map(str::trim)
                .find(|l| !l.is_empty() && !l.starts_with("#!["));
            if !first.is_some_and(|line| line.starts_with("//!")) {
                broken.push(shown(&path));
            }
        }
    }
    assert_none("each file begins with //! and what it is for", &broken);
}

#[test]
fn nothing_points_out_of_the_repository() {
    let mut broken = Vec::new();
    let outside = ["../", "shared"].concat();
    for folder in [
        "src", "crates", "sql", "scripts", "demo", "benches", "pg_test", "tests", ".ci",
    ] {
        for suffix in [".rs", ".sql", ".sh", ".py", ".md", ".toml", "run", ".spec"] {
            for path in files(&root().join(folder), suffix) {
                let text = fs::read_to_string(&path).unwrap_or_default();
                if text.contains(&outside) {
                    broken.push(shown(&path));
                }
            }
        }
    }
    assert_none(
        "the documents cite the project and public sources only",
        &broken,
    );
}
