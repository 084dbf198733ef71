use std::path::Path;

use super::*;
use crate::format::Options;

fn spec(max_record_bytes: usize) -> Spec {
    Spec {
        format: None,
        options: Options::default(),
        max_record_bytes,
    }
}

/// Events as `line: text` and bad rows as `line! error`.
fn shown(content: &[u8], max_record_bytes: usize) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.json");
    std::fs::write(&path, content).unwrap();
    let spec = spec(max_record_bytes);
    let file = Found::file(&path, "x.json");
    let mut source = open(&file, &spec, Position::default(), &Meter::default()).unwrap();
    let mut found = Vec::new();
    loop {
        match source.next() {
            Ok(Some(piece)) => {
                if let Rows::Events(events) = piece.rows {
                    found.extend(events.iter().map(|e| format!("{}: {}", e.line, e.json)));
                }
                found.extend(piece.bad.iter().map(|b| format!("{}! {}", b.line, b.error)));
            }
            Ok(None) => return found,
            Err(e) => {
                found.push(e.to_string());
                return found;
            }
        }
    }
}

#[test]
fn lines_and_arrays() {
    for (content, expect) in [
        (
            "{\"a\":1}\n\n{\"b\":2}\r\n{}",
            &["1: {\"a\":1}", "3: {\"b\":2}", "4: {}"][..],
        ),
        ("\u{feff}{\"a\":1}\n", &["1: {\"a\":1}"]),
        ("", &[]),
        ("\n\n", &[]),
        ("[]", &[]),
        (" [ ] ", &[]),
        (
            "[{\"a\":[1,2]},\n {\"b\":\"],\\\"\"}\n]\n",
            &["1: {\"a\":[1,2]}", "2: {\"b\":\"],\\\"\"}"],
        ),
        ("[1,,2,]", &["1: 1", "1: ", "1: 2"]),
        ("[1]\n[2,3]\n[][ ]\n", &["1: 1", "2: 2", "2: 3"]),
    ] {
        assert_eq!(shown(content.as_bytes(), 100), expect, "{content:?}");
    }
    assert_eq!(
        shown(b"{\"a\":\"\xff\"}\n{}\n", 100),
        ["2: {}", "1! invalid UTF-8 text"]
    );
}

#[test]
fn how_arrays_end_is_told() {
    let told = |line, error| Some(format!("{line}! {error}"));
    for (content, events, bad) in [
        // Cut off within, before and behind an element, and in the next array.
        (
            "[{\"a\":1},\n{\"b\":",
            &["1: {\"a\":1}"][..],
            told(2, NOT_CLOSED),
        ),
        ("[", &[], told(1, NOT_CLOSED)),
        ("[{\"a\":\"]", &[], told(1, NOT_CLOSED)),
        (
            "[1,\n{\"b\":2}\n",
            &["1: 1", "2: {\"b\":2}"],
            told(3, NOT_CLOSED),
        ),
        ("[1, ", &["1: 1"], told(1, NOT_CLOSED)),
        ("[1]\n[", &["1: 1"], told(2, NOT_CLOSED)),
        ("[1] trailing", &["1: 1"], told(1, MORE)),
        ("[1],[2]", &["1: 1"], told(1, MORE)),
        ("[1]\n\n{\"a\":1}\n{\"a\":2}\n", &["1: 1"], told(3, MORE)),
        ("[1]\0\0\0", &["1: 1"], told(1, MORE)),
    ] {
        let expect: Vec<String> = (events.iter().map(|e| e.to_string())).chain(bad).collect();
        assert_eq!(shown(content.as_bytes(), 100), expect, "{content:?}");
    }
    // However much it is.
    let long = format!("[1]{}", "{}\n".repeat(1 << 20));
    let more = format!("1! {MORE}");
    assert_eq!(shown(long.as_bytes(), 1 << 10), ["1: 1".to_owned(), more]);
}

#[test]
fn long_lines_are_bad_rows() {
    let long = format!("{{}}\n{{\"a\":\"{}\"}}\n{{}}\n", "x".repeat(2 << 20));
    assert_eq!(
        shown(long.as_bytes(), 1 << 20),
        [
            "1: {}",
            "3: {}",
            "2! event is over the limit of 1048576 bytes"
        ]
    );
}

#[test]
fn long_elements_are_bad_rows() {
    let over = "event is over the limit of 1048576 bytes";
    let endless = format!("[{{\"a\":\"{}", "x".repeat(2 << 20));
    assert_eq!(
        shown(endless.as_bytes(), 1 << 20),
        [format!("1! {NOT_CLOSED}")]
    );
    // Whatever is in it, and wherever what has been read ends.
    for before in 0..4 {
        let blanks = " ".repeat(before);
        let text = "\\\"],{\\\\".repeat(1 << 18);
        let list = "[{},1],".repeat(1 << 18);
        let content = format!(
            "[{{}},{blanks}{{\"a\":\"{text}\",\"b\":[{list}2]}}\n,\n{{\"c\":3}},\n\"{text}\"]"
        );
        assert_eq!(
            shown(content.as_bytes(), 1 << 20),
            [
                "1: {}".to_owned(),
                "3: {\"c\":3}".to_owned(),
                format!("1! {over}"),
                format!("4! {over}"),
            ]
        );
    }
}

fn read(path: &Path, from: Position) -> Vec<Piece> {
    let file = Found::file(path, "x.json");
    let mut source = open(&file, &spec(100), from, &Meter::default()).unwrap();
    std::iter::from_fn(|| source.next().unwrap()).collect()
}

#[test]
fn how_an_array_ends_is_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.json");
    // A piece, and a bit of another one.
    for rows in [PIECE_ROWS, PIECE_ROWS + 1] {
        let rows = vec!["1"; rows];
        for (end, bad) in [
            ("", 1),
            (",", 1),
            (",\n", 1),
            ("]", 0),
            (" ]\n", 0),
            ("] x", 1),
            ("]\n[]", 0),
            ("][", 1),
        ] {
            std::fs::write(&path, format!("[{}{end}", rows.join(","))).unwrap();
            let all = read(&path, Position::default());
            let events: usize = all.iter().map(|piece| piece.rows.len()).sum();
            assert_eq!(events, rows.len(), "{end:?}");
            let told: usize = all.iter().map(|piece| piece.bad.len()).sum();
            assert_eq!(told, bad, "{end:?}");
            // Whoever goes on behind a piece sees what is left, and nothing again.
            for (n, piece) in all.iter().enumerate() {
                let rest = read(&path, piece.after);
                assert_eq!(rest.len(), all.len() - n - 1, "{end:?}");
                for (again, first) in rest.iter().zip(&all[n + 1..]) {
                    assert_eq!(again.rows.len(), first.rows.len());
                    assert_eq!((&again.bad, again.after), (&first.bad, first.after));
                }
            }
        }
    }
}

#[test]
fn reading_continues_where_a_piece_ended() {
    let folder = tempfile::tempdir().unwrap();
    let rows: Vec<String> = (0..80_000).map(|i| format!("{{\"n\":{i}}}")).collect();
    for (name, text) in [
        ("x.ndjson", rows.join("\n")),
        ("x.json", format!("[{}]", rows.join(",\n"))),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let read = |from| {
            let file = Found::file(&path, name);
            let mut source = open(&file, &spec(100), from, &Meter::default()).unwrap();
            let mut pieces = Vec::new();
            while let Some(piece) = source.next().unwrap() {
                pieces.push(piece);
            }
            pieces
        };
        let all = read(Position::default());
        assert_eq!(all.iter().map(|p| p.rows.len()).sum::<usize>(), 80_000);
        let rest = read(all[0].after);
        assert_eq!(rest.len() + 1, all.len());
        for (a, b) in rest.iter().zip(&all[1..]) {
            let (Rows::Events(a), Rows::Events(b)) = (&a.rows, &b.rows) else {
                panic!("JSON gives events");
            };
            assert_eq!(a, b);
        }
    }
}
