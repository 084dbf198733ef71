//! The road of nearly every event: one pass over its bytes that finds the tokens and checks them at once.
//!
//! The scanner accepts a text or gives up. It accepts exactly what passes [`json::check`] and the parser behind
//! [`json::object_entries`]; why a text is refused those say, which read it again at their leisure. So the
//! scanner knows no reasons, and the messages stay those of one parser. The tests of [`crate::entry`] and
//! [`crate::keys`] hold the two against each other.

use std::borrow::Cow;
use std::ops::Range;

use crate::json;
use crate::number::Number;

/// The text is not of the usual kind: read it the careful way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unsure;

/// Without reasons, so that a refusal costs the usual road nothing.
pub(crate) type Scanned<T> = Result<T, Unsure>;

/// One bit a level.
const MAX_LEVELS: usize = u64::BITS as usize;

/// A key of an object.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key<'a> {
    quoted: &'a str,
    escaped: bool,
}

impl<'a> Key<'a> {
    pub(crate) fn text(self) -> Scanned<Cow<'a, str>> {
        if self.escaped {
            return json::string(self.quoted).ok_or(Unsure);
        }
        let inner = self.quoted.get(1..self.quoted.len().saturating_sub(1));
        inner.map(Cow::Borrowed).ok_or(Unsure)
    }
}

/// A place in a JSON text.
pub(crate) struct Scanner<'a> {
    text: &'a str,
    at: usize,
    /// Whether a line break was passed: they are valid between tokens only.
    pub(crate) line_break: bool,
}

impl<'a> Scanner<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self {
            text,
            at: 0,
            line_break: false,
        }
    }

    /// The text between two places where tokens begin or end.
    pub(crate) fn slice(&self, range: Range<usize>) -> &'a str {
        self.text.get(range).unwrap_or_default()
    }

    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// Back to a place where a token begins.
    pub(crate) fn rewind(&mut self, position: usize) {
        self.at = position;
    }

    #[inline(always)]
    fn byte(&self, at: usize) -> Scanned<u8> {
        self.text.as_bytes().get(at).copied().ok_or(Unsure)
    }

    /// The first byte of the next token, at which the scanner then is.
    #[inline(always)]
    pub(crate) fn peek(&mut self) -> Scanned<u8> {
        let first = self.byte(self.at)?;
        if first > b' ' {
            return Ok(first);
        }
        // One blank after a comma or a colon is a common style.
        let second = self.byte(self.at + 1)?;
        if first == b' ' && second > b' ' {
            self.at += 1;
            return Ok(second);
        }
        self.skip_blanks()
    }

    #[inline(never)]
    fn skip_blanks(&mut self) -> Scanned<u8> {
        loop {
            match self.byte(self.at)? {
                b' ' | b'\t' => {}
                b'\n' | b'\r' => self.line_break = true,
                // Perhaps a control character, which begins no token.
                other => return Ok(other),
            }
            self.at += 1;
        }
    }

    /// Takes the token `byte`.
    #[inline(always)]
    pub(crate) fn expect(&mut self, byte: u8) -> Scanned<()> {
        if self.peek()? != byte {
            return Err(Unsure);
        }
        self.at += 1;
        Ok(())
    }

    /// Takes the byte that separates two items: true after a comma, false after the closing byte.
    #[inline(always)]
    pub(crate) fn more(&mut self, close: u8) -> Scanned<bool> {
        let byte = self.peek()?;
        self.at += 1;
        if byte == b',' {
            Ok(true)
        } else if byte == close {
            Ok(false)
        } else {
            Err(Unsure)
        }
    }

    /// Takes an opening byte: false if its closing byte comes at once, which is then taken as well.
    pub(crate) fn open(&mut self, open: u8, close: u8) -> Scanned<bool> {
        self.expect(open)?;
        if self.peek()? == close {
            self.at += 1;
            return Ok(false);
        }
        Ok(true)
    }

    /// That nothing follows but blanks.
    pub(crate) fn end(&mut self) -> Scanned<()> {
        let rest = self.text.as_bytes().get(self.at..).unwrap_or_default();
        let blank = |b: &u8| matches!(b, b' ' | b'\t' | b'\n' | b'\r');
        if rest.iter().all(blank) {
            Ok(())
        } else {
            Err(Unsure)
        }
    }

    /// Takes an object of at most `levels` levels, itself the first, and calls `f` with each key and the range
    /// of its value, duplicates included.
    #[inline]
    pub(crate) fn object(
        &mut self,
        levels: usize,
        mut f: impl FnMut(Key<'a>, Range<usize>) -> Scanned<()>,
    ) -> Scanned<()> {
        if levels == 0 {
            return Err(Unsure);
        }
        if !self.open(b'{', b'}')? {
            return Ok(());
        }
        loop {
            let key = self.key()?;
            let value = self.value(levels - 1)?;
            f(key, value)?;
            if !self.more(b'}')? {
                return Ok(());
            }
        }
    }

    /// Takes a key and its colon.
    #[inline(always)]
    pub(crate) fn key(&mut self) -> Scanned<Key<'a>> {
        if self.peek()? != b'"' {
            return Err(Unsure);
        }
        let start = self.at;
        let escaped = self.string()?;
        let quoted = self.slice(start..self.at);
        self.expect(b':')?;
        Ok(Key { quoted, escaped })
    }

    /// Takes this key and its colon, if it comes next. Nothing in the key has to be escaped.
    #[inline(always)]
    pub(crate) fn key_if(&mut self, key: &str) -> Scanned<bool> {
        if self.peek()? != b'"' {
            return Err(Unsure);
        }
        let start = self.at + 1;
        let end = start + key.len();
        let bytes = self.text.as_bytes();
        if bytes.get(start..end) != Some(key.as_bytes()) || bytes.get(end) != Some(&b'"') {
            return Ok(false);
        }
        self.at = end + 1;
        self.expect(b':')?;
        Ok(true)
    }

    /// Takes a value of at most `levels` levels; a scalar has none.
    #[inline(always)]
    pub(crate) fn value(&mut self, levels: usize) -> Scanned<Range<usize>> {
        let first = self.peek()?;
        let start = self.at;
        match first {
            b'"' => {
                self.string()?;
            }
            b'{' | b'[' => self.nested(levels)?,
            _ => self.scalar(first)?,
        }
        Ok(start..self.at)
    }

    /// Takes an array or object, without recursion.
    fn nested(&mut self, levels: usize) -> Scanned<()> {
        // The innermost container in the lowest bit: whether it is an object.
        let mut objects: u64 = 0;
        let mut depth = 0;
        loop {
            match self.peek()? {
                b'"' => {
                    self.string()?;
                }
                open @ (b'{' | b'[') => {
                    if depth >= levels.min(MAX_LEVELS) {
                        return Err(Unsure);
                    }
                    depth += 1;
                    objects = objects << 1 | u64::from(open == b'{');
                    self.at += 1;
                    // In ASCII the closing bytes are the opening ones plus two.
                    if self.peek()? != open + 2 {
                        if open == b'{' {
                            self.key()?;
                        }
                        continue;
                    }
                }
                first => self.scalar(first)?,
            }
            // A value has ended, or an empty container is about to.
            loop {
                let is_object = objects & 1 == 1;
                if self.more(if is_object { b'}' } else { b']' })? {
                    if is_object {
                        self.key()?;
                    }
                    break;
                }
                objects >>= 1;
                depth -= 1;
                if depth == 0 {
                    return Ok(());
                }
            }
        }
    }

    /// Takes a number or a literal.
    #[inline(always)]
    fn scalar(&mut self, first: u8) -> Scanned<()> {
        match first {
            b'-' | b'0'..=b'9' => self.number(),
            b't' => self.literal(b"true"),
            b'f' => self.literal(b"false"),
            b'n' => self.literal(b"null"),
            _ => Err(Unsure),
        }
    }

    fn literal(&mut self, word: &[u8]) -> Scanned<()> {
        let end = self.at + word.len();
        if self.text.as_bytes().get(self.at..end) != Some(word) {
            return Err(Unsure);
        }
        self.at = end;
        Ok(())
    }

    #[inline(always)]
    fn digits(&mut self) -> Scanned<()> {
        if !self.byte(self.at)?.is_ascii_digit() {
            return Err(Unsure);
        }
        self.at += 1;
        while self.byte(self.at).is_ok_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
        Ok(())
    }

    #[inline(always)]
    fn number(&mut self) -> Scanned<()> {
        let start = self.at;
        if self.byte(self.at)? == b'-' {
            self.at += 1;
        }
        match self.byte(self.at)? {
            b'0' => self.at += 1,
            _ => self.digits()?,
        }
        // What follows a number that ends the text is no concern here.
        let mut next = self.byte(self.at).unwrap_or(b' ');
        if next == b'.' {
            self.at += 1;
            self.digits()?;
            next = self.byte(self.at).unwrap_or(b' ');
        }
        let exponent = matches!(next, b'e' | b'E');
        if exponent {
            self.at += 1;
            if matches!(self.byte(self.at)?, b'+' | b'-') {
                self.at += 1;
            }
            self.digits()?;
        }
        if (exponent || self.at - start > json::SHORT_NUMBER)
            && !Number::parse(self.slice(start..self.at)).is_some_and(|n| n.fits_numeric())
        {
            return Err(Unsure);
        }
        Ok(())
    }

    /// Takes a string; answers whether it has escapes.
    #[inline(always)]
    fn string(&mut self) -> Scanned<bool> {
        self.at += 1;
        self.skip_plain();
        if self.byte(self.at)? == b'"' {
            self.at += 1;
            return Ok(false);
        }
        self.escapes().map(|()| true)
    }

    /// Takes the rest of a string, from an escape on.
    #[inline(never)]
    fn escapes(&mut self) -> Scanned<()> {
        loop {
            match self.byte(self.at)? {
                b'"' => {
                    self.at += 1;
                    return Ok(());
                }
                b'\\' => self.escape()?,
                _ => return Err(Unsure),
            }
            self.skip_plain();
        }
    }

    #[inline(always)]
    fn skip_plain(&mut self) {
        let rest = self.text.as_bytes().get(self.at..).unwrap_or_default();
        self.at += json::plain_len(rest);
    }

    fn escape(&mut self) -> Scanned<()> {
        let second = match self.byte(self.at + 1)? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {
                self.at += 2;
                return Ok(());
            }
            b'u' => json::escaped_unit(self.text.as_bytes(), self.at).ok_or(Unsure)?,
            _ => return Err(Unsure),
        };
        self.at += 6;
        match second {
            // NUL, and the second half of a pair that has no first.
            0 | 0xDC00..=0xDFFF => Err(Unsure),
            0xD800..=0xDBFF => match json::escaped_unit(self.text.as_bytes(), self.at) {
                Some(0xDC00..=0xDFFF) => {
                    self.at += 6;
                    Ok(())
                }
                _ => Err(Unsure),
            },
            _ => Ok(()),
        }
    }
}
