//! JSON files: one object a line, or one array of objects. What an event may be is checked when it becomes columns; here
//! the text is only cut into events.

use memchr::{memchr, memchr_iter};

use crate::error::FilesError;
use crate::input::{self, Meter, Window};
use crate::locate::Found;
use crate::source::{
    BadRow, PIECE_BYTES, PIECE_ROWS, Piece, Position, Rows, Source, Spec, TextEvent,
};

/// A file of JSON events.
pub struct JsonSource {
    window: Window,
    array: bool,
    position: Position,
    max_record_bytes: usize,
    ended: bool,
}

/// Opens a file of lines.
pub fn lines(
    file: &Found,
    spec: &Spec,
    from: Position,
    meter: &Meter,
) -> Result<JsonSource, FilesError> {
    let input = input::open(file, from.byte, meter)?;
    Ok(JsonSource {
        window: Window::new(input, &file.name),
        array: false,
        position: from,
        max_record_bytes: spec.max_record_bytes,
        ended: false,
    })
}

/// Opens a file that is an array if it begins with `[`, else lines.
pub fn open(
    file: &Found,
    spec: &Spec,
    from: Position,
    meter: &Meter,
) -> Result<JsonSource, FilesError> {
    let mut source = lines(file, spec, Position::default(), meter)?;
    source.skip_blanks()?;
    source.array = source.window.bytes().first() == Some(&b'[');
    if from.byte > 0 {
        let array = source.array;
        source = lines(file, spec, from, meter)?;
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

    /// What is at the front, as a row that is too long.
    fn too_long(&self) -> BadRow {
        let limit = self.max_record_bytes;
        let error = format!("event is over the limit of {limit} bytes");
        BadRow::new(self.position.line + 1, self.window.bytes(), error)
    }

    fn skip_long_line(&mut self) -> Result<Text, FilesError> {
        let bad = self.too_long();
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
                return self.skip_long_element(scan).map(Some);
            }
            self.window.fill()?;
        }
    }

    /// Takes an element off that is too long, with the comma behind it. `scan` has seen what there is of it.
    fn skip_long_element(&mut self, mut scan: Scan) -> Result<Text, FilesError> {
        let bad = self.too_long();
        loop {
            let bytes = self.window.bytes();
            if let Some(end) = scan.element_end(bytes) {
                self.ended = bytes[end] == b']';
                self.advance(end + 1);
                return Ok(Text::TooLong(bad));
            }
            // All but a backslash whose byte has not been read yet.
            let seen = if self.window.ended() {
                self.ended = true;
                bytes.len()
            } else {
                scan.at
            };
            self.advance(seen);
            scan.at = 0;
            if self.ended {
                return Ok(Text::TooLong(bad));
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
            bytes: bytes as u64,
            after: self.position,
        }))
    }
}

#[cfg(test)]
mod tests;
