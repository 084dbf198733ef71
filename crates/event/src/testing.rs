//! Random events for the tests of this crate, and as a beginning for the fuzz targets.

use crate::types::FieldType;

/// Every type a field can have, with these (precision, scale) of numeric.
pub fn every_type(numerics: &[(u8, u8)]) -> Vec<FieldType> {
    let numerics = numerics
        .iter()
        .map(|&(precision, scale)| FieldType::Numeric { precision, scale });
    [
        FieldType::Bool,
        FieldType::Int4,
        FieldType::Int8,
        FieldType::Float4,
        FieldType::Float8,
    ]
    .into_iter()
    .chain(numerics)
    .chain([
        FieldType::Text,
        FieldType::Date,
        FieldType::Timestamptz,
        FieldType::Uuid,
        FieldType::Inet,
        FieldType::Jsonb,
        FieldType::BoolArray,
        FieldType::Float8Array,
        FieldType::TextArray,
    ])
    .collect()
}

/// A small generator of random numbers (splitmix64), so that a failing seed can be run again.
pub struct Random(pub u64);

impl Random {
    // Endless and of one type: nothing is gained by an iterator.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn pick<'a>(&mut self, items: &[&'a str]) -> &'a str {
        items[(self.next() % items.len() as u64) as usize]
    }

    pub fn value(&mut self, depth: usize) -> String {
        match self.next() % if depth < 3 { 12 } else { 9 } {
            0 => "null".to_owned(),
            1 => self.pick(&["true", "false", "\"true\""]).to_owned(),
            2..=4 => self
                .pick(&[
                    "0",
                    "-0",
                    "-0.0",
                    "1",
                    "1.0",
                    "1e0",
                    "2.50",
                    "1e2",
                    "-7.25e-3",
                    "1e25",
                    "1e400",
                    "1e-400",
                    "9007199254740993",
                    "9223372036854775808",
                    "1e300",
                    "123456789012345678901234567890.5",
                    "\"12\"",
                    "\"1e5\"",
                    "\"NaN\"",
                ])
                .to_owned(),
            5..=8 => self
                .pick(&[
                    "\"\"",
                    "\"x\"",
                    "\"a b\\n\\\"\"",
                    "\"\\u0041é\"",
                    "\"2020-01-02\"",
                    "\"2020-02-30\"",
                    "\"2020-01-02 03:04:05.5+02\"",
                    "\"2020-01-02T03:04Z\"",
                    "\"\\ud83d\\ude00\"",
                    "\"a string that is long enough to be cut by the limit\"",
                    "\"a0eebc999c0b4ef8bb6d6bb9bd380a11\"",
                    "\"10.0.0.1/8\"",
                    "\"null\"",
                ])
                .to_owned(),
            9 | 10 => {
                let items: Vec<_> = (0..self.next() % 4)
                    .map(|_| self.value(depth + 1))
                    .collect();
                format!("[{}]", items.join(self.pick(&[",", " , ", ",\n"])))
            }
            _ => self.object(depth + 1, 3),
        }
    }

    pub fn object(&mut self, depth: usize, keys: u64) -> String {
        let entries: Vec<_> = (0..self.next() % (keys + 1))
            .map(|_| {
                let key = self.pick(&[
                    "a",
                    "A",
                    "b",
                    "userName",
                    "user_name",
                    "n",
                    "at",
                    "x y",
                    "xmin",
                    "",
                    "_new",
                    "_user",
                    "_id",
                    "_time",
                    "\\u0061",
                    "tags",
                    "k\\\"q",
                    "k\\\\",
                ]);
                format!("\"{key}\":{}", self.value(depth))
            })
            .collect();
        format!("{{{}}}", entries.join(self.pick(&[",", ", "])))
    }
    /// The text with a few bytes changed, taken out or put in, still UTF-8: most often no JSON any more.
    pub fn mangled(&mut self, text: &str) -> String {
        const BYTES: &[u8] = b"{}[]\"\\:,. \n\t-+0123456789eEtfnu_$ad\x00\x01\x7f";
        let mut bytes = text.as_bytes().to_vec();
        for _ in 0..=self.next() % 3 {
            let at = (self.next() % (bytes.len() as u64 + 1)) as usize;
            let byte = BYTES[(self.next() % BYTES.len() as u64) as usize];
            match self.next() % 3 {
                0 => bytes.insert(at, byte),
                1 if at < bytes.len() => bytes[at] = byte,
                _ if at < bytes.len() => drop(bytes.remove(at)),
                _ => {}
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
