//! JSON files: one object a line, or an array of objects, or several arrays one behind the other. What an event may be is
//! checked when it becomes columns; here the text is only cut into events.

use memchr::{memchr, memchr_iter};

use crate::error::FilesError;
use crate::input::{self, Meter, Window};
use crate::locate::Found;
use crate::source::{
    BadRow, PIECE_BYTES, PIECE_ROWS, Piece, Position, Rows, Source, Spec, TextEvent,
};

const NOT_CLOSED: &str = "the array is not closed: the file may have been cut off";
const MORE: &str = "there is more behind the end of the array";

/// A file of JSON events. Of arrays, a piece ends within one, before its bracket at the latest, or at the end of the file.
pub struct JsonSource {
    window: Window,
    array: bool,
    position: Position,
    max_record_bytes: usize,
    /// Of a file of arrays: nothing of it is left.
    ended: bool,
    /// Rows of a piece.
    most: usize,
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
        most: PIECE_ROWS,
    })
}

/// Opens a file of arrays if it begins with `[`, else of lines.
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
        // How its arrays end has been told, then.
        source.ended = array && source.is_at_end()?;
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

    /// Whether nothing of the file is left.
    fn is_at_end(&mut self) -> Result<bool, FilesError> {
        if self.window.bytes().is_empty() && !self.window.ended() {
            self.window.fill()?;
        }
        Ok(self.window.bytes().is_empty())
    }

    /// The length of the line at the front, without its end; None at the end of the file. One that is too long has been
    /// read and taken off.
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
                return self.skip_long_line().map(Text::Bad).map(Some);
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

    fn skip_long_line(&mut self) -> Result<BadRow, FilesError> {
        let bad = self.too_long();
        loop {
            let bytes = self.window.bytes();
            if let Some(end) = memchr(b'\n', bytes) {
                self.advance(end + 1);
                return Ok(bad);
            }
            let length = bytes.len();
            self.advance(length);
            if self.window.ended() {
                return Ok(bad);
            }
            self.window.fill()?;
        }
    }

    /// As [`Self::line`], for the next element of the array, or of the one behind it.
    fn element(&mut self) -> Result<Option<Text>, FilesError> {
        while !self.ended {
            self.skip_blanks()?;
            match self.window.bytes().first() {
                None => return self.rest(NOT_CLOSED).map(Text::Bad).map(Some),
                Some(b']') => {}
                Some(_) => return self.element_here().map(Some),
            }
            self.advance(1);
            self.skip_blanks()?;
            match self.window.bytes().first() {
                None => self.ended = true,
                Some(b'[') => self.advance(1),
                Some(_) => return self.rest(MORE).map(Text::Bad).map(Some),
            }
        }
        Ok(None)
    }

    fn element_here(&mut self) -> Result<Text, FilesError> {
        let mut scan = Scan::default();
        loop {
            let bytes = self.window.bytes();
            if let Some(end) = scan.element_end(bytes) {
                return Ok(Text::Whole(end));
            }
            if self.window.ended() {
                return match scan.is_within() {
                    true => self.rest(NOT_CLOSED).map(Text::Bad),
                    false => Ok(Text::Whole(bytes.len())),
                };
            }
            if bytes.len() > self.max_record_bytes + 1 {
                return self.skip_long_element(scan).map(Text::Bad);
            }
            self.window.fill()?;
        }
    }

    /// Takes an element off that is too long, with the comma behind it. `scan` has seen what there is of it.
    fn skip_long_element(&mut self, mut scan: Scan) -> Result<BadRow, FilesError> {
        let mut bad = self.too_long();
        loop {
            let bytes = self.window.bytes();
            if let Some(end) = scan.element_end(bytes) {
                let comma = usize::from(bytes[end] == b',');
                self.advance(end + comma);
                return Ok(bad);
            }
            if self.window.ended() {
                // It may have taken all that came after it.
                bad.error = NOT_CLOSED.to_owned();
                let length = bytes.len();
                self.advance(length);
                self.ended = true;
                return Ok(bad);
            }
            // All but a backslash whose byte has not been read yet.
            self.advance(scan.at);
            scan.at = 0;
            self.window.fill()?;
        }
    }

    /// Takes all off that is left of the file, as one bad row.
    fn rest(&mut self, error: &str) -> Result<BadRow, FilesError> {
        while !self.window.ended() && self.window.bytes().len() <= self.max_record_bytes {
            self.window.fill()?;
        }
        let raw = self.window.bytes().trim_ascii();
        let bad = BadRow::new(self.position.line + 1, raw, error);
        loop {
            let length = self.window.bytes().len();
            self.advance(length);
            if self.window.ended() {
                self.ended = true;
                return Ok(bad);
            }
            self.window.fill()?;
        }
    }
}

/// What is at the front.
enum Text {
    /// Of so many bytes.
    Whole(usize),
    /// It was no event, and has been taken off.
    Bad(BadRow),
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

    /// Whether what has been seen cannot be all of the element.
    fn is_within(&self) -> bool {
        self.in_string || self.depth > 0
    }
}

impl Source for JsonSource {
    fn next(&mut self) -> Result<Option<Piece>, FilesError> {
        let mut events = Vec::new();
        let mut bad = Vec::new();
        let mut bytes = 0;
        // That an array is not closed is told with its last elements: who goes on from the end of the file does not see it.
        while events.len() < self.most && bad.len() < self.most && bytes < PIECE_BYTES
            || self.array && self.is_at_end()?
        {
            let next = if self.array {
                self.element()?
            } else {
                self.line()?
            };
            let length = match next {
                None => break,
                Some(Text::Bad(row)) => {
                    bytes += row.bytes.len() + 1;
                    bad.push(row);
                    self.position.row += 1;
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
            // A line may be blank.
            if self.array || !raw.is_empty() {
                self.position.row += 1;
                match std::str::from_utf8(raw) {
                    Ok(json) => events.push(TextEvent {
                        line,
                        json: json.to_owned(),
                    }),
                    Err(_) => bad.push(BadRow::new(line, raw, "invalid UTF-8 text")),
                }
            }
            bytes += length + 1;
            self.advance(length + usize::from(matches!(end, Some(b',' | b'\n'))));
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

    fn bound(&mut self, rows: usize) {
        self.most = rows.clamp(1, PIECE_ROWS);
    }
}

#[cfg(test)]
mod tests;
