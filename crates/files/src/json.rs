//! JSON files: one object a line, or one array of objects. What an event may be is checked when it becomes columns; here
//! the text is only cut into events.

use std::path::Path;

use memchr::{memchr, memchr_iter};

use crate::error::FilesError;
use crate::format::Compression;
use crate::input::{self, Meter, Window};
use crate::source::{
    BadRow, PIECE_BYTES, PIECE_ROWS, Piece, Position, Rows, Source, Spec, TextEvent,
};

/// A file of JSON events.
pub struct JsonSource {
    window: Window,
    name: String,
    array: bool,
    position: Position,
    max_record_bytes: usize,
    ended: bool,
}

/// Opens a file of lines.
pub fn lines(
    path: &Path,
    name: &str,
    spec: &Spec,
    from: Position,
    meter: &Meter,
) -> Result<JsonSource, FilesError> {
    let input = input::open(path, name, Compression::of_name(name), from.byte, meter)?;
    Ok(JsonSource {
        window: Window::new(input, name),
        name: name.to_owned(),
        array: false,
        position: from,
        max_record_bytes: spec.max_record_bytes,
        ended: false,
    })
}

/// Opens a file that is an array if it begins with `[`, else lines.
pub fn open(
    path: &Path,
    name: &str,
    spec: &Spec,
    from: Position,
    meter: &Meter,
) -> Result<JsonSource, FilesError> {
    let mut source = lines(path, name, spec, Position::default(), meter)?;
    source.skip_blanks()?;
    source.array = source.window.bytes().first() == Some(&b'[');
    if from.byte > 0 {
        let array = source.array;
        source = lines(path, name, spec, from, meter)?;
        source.array = array;
    } else if source.array {
        source.advance(1);
    }
    Ok(source)
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

impl JsonSource {
    fn advance(&mut self, n: usize) {
        let taken = &self.window.bytes()[..n];
        self.position.line += memchr_iter(b'\n', taken).count() as u64;
        self.position.byte += n as u64;
        self.window.take(n);
    }

    fn skip_blanks(&mut self) -> Result<(), FilesError> {
        loop {
            let bytes = self.window.bytes();
            let bytes = if self.position.byte == 0 {
                bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
            } else {
                bytes
            };
            let mark = self.window.bytes().len() - bytes.len();
            let blanks = bytes.iter().position(|&b| !is_blank(b));
            let n = mark + blanks.unwrap_or(bytes.len());
            self.advance(n);
            if blanks.is_some() || self.window.ended() {
                return Ok(());
            }
            self.window.fill()?;
        }
    }

    /// The length of the line at the front, without its end; None at the end of the file. Also whether it is too long,
    /// in which case it has been read and taken off, but for nothing.
    fn line(&mut self) -> Result<Option<Text>, FilesError> {
        let mut searched = 0;
        loop {
            let bytes = self.window.bytes();
            if let Some(found) = memchr(b'\n', &bytes[searched..]) {
                return Ok(Some(Text::Whole(searched + found)));
            }
            if self.window.ended() {
                return Ok((!bytes.is_empty()).then_some(Text::Whole(bytes.len())));
            }
            if bytes.len() > self.max_record_bytes {
                return self.skip_long_line().map(Some);
            }
            searched = bytes.len();
            self.window.fill()?;
        }
    }

    fn skip_long_line(&mut self) -> Result<Text, FilesError> {
        let line = self.position.line + 1;
        let limit = self.max_record_bytes;
        let error = format!("event is over the limit of {limit} bytes");
        let bad = BadRow::new(line, self.window.bytes(), error);
        loop {
            let bytes = self.window.bytes();
            if let Some(end) = memchr(b'\n', bytes) {
                self.advance(end + 1);
                return Ok(Text::TooLong(bad));
            }
            let length = bytes.len();
            self.advance(length);
            if self.window.ended() {
                return Ok(Text::TooLong(bad));
            }
            self.window.fill()?;
        }
    }

    /// As [`Self::line`], for the next element of the array.
    fn element(&mut self) -> Result<Option<Text>, FilesError> {
        if self.ended {
            return Ok(None);
        }
        self.skip_blanks()?;
        let mut scan = Scan::default();
        loop {
            let bytes = self.window.bytes();
            if let Some(end) = scan.element_end(bytes) {
                return Ok(Some(Text::Whole(end)));
            }
            if self.window.ended() {
                // The array's own bracket is missing.
                self.ended = true;
                return Ok((!bytes.is_empty()).then_some(Text::Whole(bytes.len())));
            }
            if bytes.len() > self.max_record_bytes + 1 {
                return Err(FilesError::RecordTooLarge {
                    name: self.name.clone(),
                    line: self.position.line + 1,
                    limit: self.max_record_bytes,
                });
            }
            self.window.fill()?;
        }
    }
}

enum Text {
    Whole(usize),
    TooLong(BadRow),
}

/// Looks for the `,` or `]` that ends an element of the outermost array.
#[derive(Default)]
struct Scan {
    at: usize,
    depth: usize,
    in_string: bool,
}

impl Scan {
    fn element_end(&mut self, bytes: &[u8]) -> Option<usize> {
        while let Some(&byte) = bytes.get(self.at) {
            if self.in_string {
                match byte {
                    // The escaped byte may not have been read yet.
                    b'\\' if self.at + 1 == bytes.len() => return None,
                    b'\\' => self.at += 1,
                    b'"' => self.in_string = false,
                    _ => {}
                }
            } else {
                match byte {
                    b'"' => self.in_string = true,
                    b'{' | b'[' => self.depth += 1,
                    b'}' | b']' if self.depth > 0 => self.depth -= 1,
                    b',' | b']' if self.depth == 0 => return Some(self.at),
                    _ => {}
                }
            }
            self.at += 1;
        }
        None
    }
}

impl Source for JsonSource {
    fn next(&mut self) -> Result<Option<Piece>, FilesError> {
        let mut events = Vec::new();
        let mut bad = Vec::new();
        let mut bytes = 0;
        while events.len() < PIECE_ROWS && bad.len() < PIECE_ROWS && bytes < PIECE_BYTES {
            let next = if self.array {
                self.element()?
            } else {
                self.line()?
            };
            let length = match next {
                None => break,
                Some(Text::TooLong(row)) => {
                    bad.push(row);
                    self.position.row += 1;
                    bytes += self.max_record_bytes;
                    continue;
                }
                Some(Text::Whole(length)) => length,
            };
            let end = self.window.bytes().get(length).copied();
            let line = self.position.line + 1;
            let raw = self.window.bytes()[..length].trim_ascii();
            let raw = if self.position.byte == 0 {
                raw.strip_prefix(b"\xef\xbb\xbf").unwrap_or(raw)
            } else {
                raw
            };
            // An array's last comma, and an empty array, have nothing before the bracket.
            let nothing = raw.is_empty() && (!self.array || end == Some(b']'));
            if !nothing {
                self.position.row += 1;
                match std::str::from_utf8(raw) {
                    Ok(json) => events.push(TextEvent {
                        line,
                        json: json.to_owned(),
                    }),
                    Err(_) => bad.push(BadRow::new(line, raw, "invalid UTF-8 text")),
                }
            }
            self.ended |= self.array && end == Some(b']');
            bytes += length + 1;
            self.advance(length + usize::from(end.is_some()));
        }
        if bytes == 0 {
            return Ok(None);
        }
        Ok(Some(Piece {
            rows: Rows::Events(events),
            bad,
            after: self.position,
        }))
    }
}

#[cfg(test)]
mod tests {
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
        let mut source = open(
            &path,
            "x.json",
            &spec,
            Position::default(),
            &Meter::default(),
        )
        .unwrap();
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
        let endless = format!("[{{\"a\":\"{}", "x".repeat(2 << 20));
        assert!(shown(endless.as_bytes(), 1 << 20)[0].contains("line 1: a record is larger"));
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
                let mut source = open(&path, name, &spec(100), from, &Meter::default()).unwrap();
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
}
