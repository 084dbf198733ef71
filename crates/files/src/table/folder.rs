//! Values in the names of folders, `key=value`, as Hive and its heirs lay tables out.

use std::collections::BTreeMap;

use rakam_event::time;

use super::types::{Base, SqlType};
use crate::locate::Found;

/// What Hive writes for NULL.
const NULL: &str = "__HIVE_DEFAULT_PARTITION__";

/// The keys and values that the folders of a file say, outermost first. None is NULL.
pub fn values(name: &str) -> Vec<(String, Option<String>)> {
    let folders = name.rsplit_once('/').map_or("", |(folders, _)| folders);
    folders
        .split('/')
        .filter_map(|folder| folder.split_once('='))
        .filter(|(key, _)| !key.is_empty())
        .map(|(key, value)| (unescape(key), (value != NULL).then(|| unescape(value))))
        .collect()
}

/// Columns by the folders of all files: whole numbers and days where all values are such, else text.
pub fn columns(files: &[Found]) -> Vec<(String, SqlType)> {
    let mut found = BTreeMap::<String, Option<SqlType>>::new();
    for file in files {
        for (key, value) in values(&file.name) {
            let known = found.entry(key).or_default();
            let Some(value) = value else { continue };
            let ty = SqlType::of(shown(&value));
            *known = Some(match *known {
                Some(known) if known != ty => SqlType::TEXT,
                _ => ty,
            });
        }
    }
    found
        .into_iter()
        .map(|(key, ty)| (key, ty.unwrap_or(SqlType::TEXT)))
        .collect()
}

fn shown(value: &str) -> Base {
    // What would be printed in another way is no number: 007.
    if value.parse::<i64>().is_ok_and(|n| n.to_string() == value) {
        Base::Int8
    } else if time::exact_date(value).is_some() {
        Base::Date
    } else {
        Base::Text
    }
}

/// `%41` is `A`; what is no such escape stays.
fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let escaped = (byte == b'%')
            .then(|| bytes.get(at + 1..at + 3))
            .flatten()
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        plain.push(escaped.unwrap_or(byte));
        at += if escaped.is_some() { 3 } else { 1 };
    }
    String::from_utf8(plain).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_say_values() {
        let some = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
        assert_eq!(
            values("data/year=2024/city=New%20York/x=y.parquet"),
            [some("year", "2024"), some("city", "New York")]
        );
        assert_eq!(values("x=1.csv"), []);
        assert_eq!(
            values("a=__HIVE_DEFAULT_PARTITION__/b=%zz/x.csv"),
            [("a".to_owned(), None), some("b", "%zz")]
        );
        let file = |name: &str| Found::file(name, name);
        let files = [
            file("y=2024/d=2024-01-02/c=007/x.csv"),
            file("y=2025/d=__HIVE_DEFAULT_PARTITION__/c=1/x.csv"),
        ];
        assert_eq!(
            columns(&files),
            [
                ("c".to_owned(), SqlType::TEXT),
                ("d".to_owned(), SqlType::of(Base::Date)),
                ("y".to_owned(), SqlType::of(Base::Int8)),
            ]
        );
    }
}
