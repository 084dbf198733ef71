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
        ("[{\"a\":1},{\"b\":", &["1: {\"a\":1}", "1: {\"b\":"]),
        ("[1] trailing", &["1: 1"]),
    ] {
        assert_eq!(shown(content.as_bytes(), 100), expect, "{content:?}");
    }
    assert_eq!(
        shown(b"{\"a\":\"\xff\"}\n{}\n", 100),
        ["2: {}", "1! invalid UTF-8 text"]
    );
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
    assert_eq!(shown(endless.as_bytes(), 1 << 20), [format!("1! {over}")]);
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
