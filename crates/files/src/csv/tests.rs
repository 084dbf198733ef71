use std::path::Path;

use super::*;
use crate::format::Options;
use arrow::array::{Array, AsArray};

fn spec(options: &str) -> Spec {
    Spec {
        format: None,
        options: Options::parse(options).unwrap(),
        max_record_bytes: 1 << 20,
    }
}

fn read(path: &Path, options: &str, from: Position) -> Vec<Piece> {
    let file = Found::file(path, "x.csv");
    let mut source = CsvSource::open(&file, &spec(options), from, &Meter::default()).unwrap();
    let mut pieces = Vec::new();
    while let Some(piece) = source.next().unwrap() {
        pieces.push(piece);
    }
    pieces
}

/// Rows as `a|NULL|c`, bad ones as `line: error`, of a file with this content.
fn shown(content: &[u8], options: &str) -> (Vec<String>, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.csv");
    std::fs::write(&path, content).unwrap();
    let (mut rows, mut bad) = (Vec::new(), Vec::new());
    for piece in read(&path, options, Position::default()) {
        let Rows::Columns { batch, lines, .. } = &piece.rows else {
            panic!("CSV gives columns");
        };
        for (row, line) in lines.iter().enumerate().take(batch.num_rows()) {
            let cells: Vec<&str> = batch
                .columns()
                .iter()
                .map(|c| {
                    if c.is_null(row) {
                        "NULL"
                    } else {
                        c.as_string::<i32>().value(row)
                    }
                })
                .collect();
            rows.push(format!("{line}: {}", cells.join("|")));
        }
        bad.extend(piece.bad.iter().map(|b| format!("{}: {}", b.line, b.error)));
    }
    (rows, bad)
}

fn check(content: &str, options: &str, expect: &[&str], expect_bad: &[&str]) {
    let (rows, bad) = shown(content.as_bytes(), options);
    assert_eq!(rows, expect, "{content:?}");
    assert_eq!(bad, expect_bad, "{content:?}");
}

#[test]
fn records_and_cells() {
    check("a,b\n1,2\n3,4\n", "{}", &["2: 1|2", "3: 3|4"], &[]);
    check("a,b\r\n1,2\r\n3,4", "{}", &["2: 1|2", "3: 3|4"], &[]);
    check("\u{feff}a,b\n1,\n", "{}", &["2: 1|NULL"], &[]);
    check("a,b\n\"\",x\n", "{}", &["2: |x"], &[]);
    check(
        "a,b\n\"x,\"\"y\"\"\",\"two\nlines\"\n5,6\n",
        "{}",
        &["2: x,\"y\"|two\nlines", "4: 5|6"],
        &[],
    );
    check("a\n\n1\n", "{}", &["2: NULL", "3: 1"], &[]);
    check("a,b\n\n1,2\n\n", "{}", &["3: 1|2"], &[]);
    check(
        "a;b\nNA;'x''y'\n;2\n",
        r#"{"delimiter": ";", "quote": "'", "null": "NA"}"#,
        &["2: NULL|x'y", "3: |2"],
        &[],
    );
    check(
        "a,b\n\"x\\\"y\",\"\\\\\"\n",
        r#"{"escape": "\\"}"#,
        &["2: x\"y|\\"],
        &[],
    );
    check(
        "1,2\n3,4\n",
        r#"{"header": false}"#,
        &["1: 1|2", "2: 3|4"],
        &[],
    );
    check("", "{}", &[], &[]);
    check("a,b\n", "{}", &[], &[]);
    check("a,b\nx\"y\"z,1", "{}", &["2: xyz|1"], &[]);
}

#[test]
fn bad_records_are_known_by_their_line() {
    check(
        "a,b\n1\n\"x\ny\",2\n1,2,3\n4,5\n",
        "{}",
        &["3: x\ny|2", "6: 4|5"],
        &[
            "2: expected 2 columns, found 1",
            "5: expected 2 columns, found 3",
        ],
    );
    check(
        "a,b\n1,2\n3,\"open\n4,5\n",
        "{}",
        &["2: 1|2"],
        &["3: a quote is not closed"],
    );
    let (rows, bad) = shown(b"a,b\n1,\xff\n3,4\n", "{}");
    assert_eq!(rows, ["3: 3|4"]);
    assert_eq!(bad, ["2: invalid UTF-8 text"]);
}

#[test]
fn reading_continues_where_a_piece_ended() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.csv");
    let mut text = String::from("a,b\n");
    for i in 0..100_000 {
        text += &format!("{i},\"line\n{i}\"\n");
    }
    std::fs::write(&path, &text).unwrap();
    let pieces = read(&path, "{}", Position::default());
    assert!(pieces.len() > 3);
    let rows: usize = pieces.iter().map(|p| p.rows.len()).sum();
    assert_eq!(rows, 100_000);
    let rest = read(&path, "{}", pieces[0].after);
    assert_eq!(rest.len(), pieces.len() - 1);
    assert_eq!(rest.last().map(|p| p.after), pieces.last().map(|p| p.after));
    let (
        Rows::Columns {
            batch: a, lines: x, ..
        },
        Rows::Columns {
            batch: b, lines: y, ..
        },
    ) = (&rest[0].rows, &pieces[1].rows)
    else {
        panic!("CSV gives columns");
    };
    assert_eq!((a, x), (b, y));
}

#[test]
fn a_record_that_is_too_long_is_a_bad_row() {
    let (cell, lines) = ("x".repeat(3 << 20), "say \"\"x\"\",\n".repeat(1 << 18));
    let content = format!("a,b\n1,2\n{cell},x\r\n3,4\r{cell}\n5,\"{lines}\"\n6,7\n");
    let (rows, bad) = shown(content.as_bytes(), "{}");
    let last = format!("{}: 6|7", 6 + (1 << 18));
    assert_eq!(rows, ["2: 1|2", "4: 3|4", &last]);
    let over = |line: u64| format!("{line}: record is over the limit of 1048576 bytes");
    assert_eq!(bad, [3, 4, 5].map(over));
}

/// However its bytes come.
#[test]
fn a_record_is_passed_over_to_its_own_end() {
    for (content, options) in [
        ("a,b\nc", "{}"),
        ("a\r\nc", "{}"),
        ("a\rc", "{}"),
        ("a\r", "{}"),
        ("\"a\"\"\n\"\"\",\"\r\n\"x\r\nc", "{}"),
        ("\"a\"", "{}"),
        ("\"a\"\"", "{}"),
        (
            "'a\\'\n\\\\',\\'\n'\nc",
            r#"{"quote": "'", "escape": "\\"}"#,
        ),
    ] {
        let options = spec(options).options.csv("x.csv").unwrap();
        let (bytes, marks) = (content.as_bytes(), Marks::new(&options));
        let mut record = Record::default();
        let length = read_record(bytes, true, &options, marks, &mut record).unwrap();
        for step in 1..=bytes.len() {
            let (mut at, mut end, mut quoted) = (0, step, false);
            loop {
                let ended = end == bytes.len();
                let (n, is_end) = pass_over(&bytes[at..end], ended, &options, marks, &mut quoted);
                at += n;
                if is_end {
                    break;
                }
                end = (end + step).min(bytes.len());
            }
            assert_eq!(at, length, "{content:?} by {step}");
            assert_eq!(quoted, record.cells.is_empty(), "{content:?} by {step}");
        }
    }
}

#[test]
fn a_header_that_is_too_long_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.csv");
    std::fs::write(&path, "x\n".repeat(1 << 20).replacen('x', "\"", 1)).unwrap();
    let file = Found::file(path, "x.csv");
    let opened = CsvSource::open(&file, &spec("{}"), Position::default(), &Meter::default());
    assert_eq!(opened.map(drop).map_err(|e| e.sqlstate()), Err("54000"));
}

#[test]
fn an_endless_record_is_one_bad_row() {
    let content = format!("a,b\n1,\"{}", "x\n".repeat(1 << 20));
    check(&content, "{}", &[], &["2: a quote is not closed"]);
}

/// Whatever lies around them, and however long the cells are.
#[test]
fn marks_are_found_at_every_place() {
    let marks = Marks::new(
        &spec(r#"{"delimiter": ";", "quote": "'"}"#)
            .options
            .csv("x.csv")
            .unwrap(),
    );
    for filler in [b'a', b'\0', b'\t', b':', b'<', 0x7f, 0x80, 0xbb, 0xff] {
        for length in 0..40 {
            let mut bytes = vec![filler; length];
            assert_eq!(marks.plain(&bytes), length);
            for mark in *b";'\r\n" {
                for at in 0..length {
                    bytes[at] = mark;
                    assert_eq!(marks.plain(&bytes), at);
                    bytes[at..].reverse();
                    let first = bytes.iter().position(|&b| b == mark);
                    assert_eq!(Some(marks.plain(&bytes)), first);
                    bytes.fill(filler);
                }
            }
        }
    }
}

#[test]
fn bad_bytes_are_told_of_their_own_record() {
    let mut content = b"a,b\n".to_vec();
    for n in 0..40_000 {
        content.extend_from_slice(format!("{n},\u{e4}\u{20ac}\n").as_bytes());
        if n % 9_999 == 5 {
            content.extend_from_slice(b"x,\xff\n");
        }
    }
    let (rows, bad) = shown(&content, "{}");
    assert_eq!(rows.len(), 40_000);
    assert_eq!(rows[39_999], "40005: 39999|\u{e4}\u{20ac}");
    let lines = [8, 10_008, 20_008, 30_008];
    assert_eq!(bad.len(), lines.len());
    for (bad, line) in bad.iter().zip(lines) {
        assert_eq!(bad, &format!("{line}: invalid UTF-8 text"));
    }
}

#[test]
fn a_record_is_read_again_out_of_its_file() {
    let names = ["a", "b"].map(str::to_owned);
    let again = |bytes: &[u8], options: &str| {
        let options = Options::parse(options).unwrap().csv("x.csv").unwrap();
        let Rows::Columns { batch, .. } = record_again(bytes, &names, &options)? else {
            panic!("CSV gives columns");
        };
        let cell = |column: usize| {
            let cells = batch.column(column).as_string::<i32>();
            cells.is_valid(0).then(|| cells.value(0).to_owned())
        };
        Ok::<_, String>((cell(0), cell(1)))
    };
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(again(b"1,x\r\n", "{}"), Ok((some("1"), some("x"))));
    assert_eq!(again(b",\"\"", "{}"), Ok((None, some(""))));
    assert_eq!(
        again(
            b"'1;';NA",
            r#"{"delimiter": ";", "quote": "'", "null": "NA"}"#
        ),
        Ok((some("1;"), None))
    );
    let wrong = |bytes: &[u8]| again(bytes, "{}").unwrap_err();
    assert_eq!(wrong(b"1,2,3"), "expected 2 columns, found 3");
    assert_eq!(wrong(b"1"), "expected 2 columns, found 1");
    assert_eq!(wrong(b"1,2\n3,4\n"), "it is more than one record");
    assert_eq!(wrong(b"1,\"2"), "a quote is not closed");
    assert_eq!(wrong(b"1,\xff"), "invalid UTF-8 text");
    assert!(again(b"", "{}").is_err());
}
