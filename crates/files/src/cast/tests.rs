use super::*;
use arrow::array::{
    BooleanArray, Date32Array, Decimal128Array, DictionaryArray, Float64Array, Int64Array,
    ListArray, TimestampNanosecondArray, UInt64Array,
};
use arrow::datatypes::Int8Type;
use rakam_event::print;

/// The column as JSON of its values, and the notes as `row: error`.
fn shown(array: ArrayRef, ty: FieldType, untyped: bool) -> (Vec<String>, Vec<String>) {
    let array = cell::plain(&array).unwrap();
    let cast = cast(&array, ty, untyped, 10).unwrap();
    assert_eq!(cast.array.data_type(), &ty.arrow());
    let values = (0..cast.array.len())
        .map(|row| {
            let mut out = String::new();
            print::to_json_text(&cast.array, ty, row, &mut out).unwrap();
            out
        })
        .collect();
    let notes = cast
        .notes
        .iter()
        .map(|n| format!("{}: {}", n.row, n.error))
        .collect();
    (values, notes)
}

fn check(array: impl Array + 'static, ty: FieldType, values: &[&str], notes: &[&str]) {
    let (got, told) = shown(Arc::new(array), ty, false);
    assert_eq!(got, values, "as {ty}");
    assert_eq!(told, notes, "as {ty}");
}

fn check_text(cells: &[Option<&str>], ty: FieldType, values: &[&str], notes: &[&str]) {
    let (got, told) = shown(Arc::new(StringArray::from(cells.to_vec())), ty, true);
    assert_eq!(got, values, "as {ty}");
    assert_eq!(told, notes, "as {ty}");
}

#[test]
fn typed_columns() {
    check(
        Int64Array::from(vec![Some(1), None]),
        FieldType::Float8,
        &["1", "null"],
        &[],
    );
    check(
        Int64Array::from(vec![1, 9_007_199_254_740_993]),
        FieldType::Float8,
        &["1", "null"],
        &["1: number is out of range for type double precision"],
    );
    check(
        Int64Array::from(vec![1, 1 << 40]),
        FieldType::Int4,
        &["1", "null"],
        &["1: number is out of range for type integer"],
    );
    check(
        UInt64Array::from(vec![u64::MAX]),
        FieldType::Numeric {
            precision: 20,
            scale: 0,
        },
        &["18446744073709551615"],
        &[],
    );
    check(Int64Array::from(vec![7]), FieldType::Text, &["\"7\""], &[]);
    check(
        Float64Array::from(vec![-0.0, 1.5]),
        FieldType::Float8,
        &["0", "1.5"],
        &[],
    );
    check(
        Float64Array::from(vec![f64::NAN, 1.5, f64::INFINITY]),
        FieldType::Float8,
        &["null", "1.5", "null"],
        &[
            "0: text is not a value of type double precision",
            "2: text is not a value of type double precision",
        ],
    );
    check(
        Float64Array::from(vec![2.0, 2.5]),
        FieldType::Int8,
        &["2", "null"],
        &["1: number is not whole"],
    );
    check(
        BooleanArray::from(vec![true]),
        FieldType::Text,
        &["\"true\""],
        &[],
    );
    check(
        Date32Array::from(vec![19_000]),
        FieldType::Timestamptz,
        &["\"2022-01-08T00:00:00+00:00\""],
        &[],
    );
    check(
        TimestampNanosecondArray::from(vec![1_500_000_000_123_456_789]),
        FieldType::Timestamptz,
        &["\"2017-07-14T02:40:00.123456+00:00\""],
        &[],
    );
    let money = Decimal128Array::from(vec![12_345])
        .with_precision_and_scale(10, 2)
        .unwrap();
    check(
        money.clone(),
        FieldType::Numeric {
            precision: 12,
            scale: 2,
        },
        &["123.45"],
        &[],
    );
    check(money, FieldType::Float8, &["123.45"], &[]);
    let words: DictionaryArray<Int8Type> = vec![Some("a"), None, Some("a")].into_iter().collect();
    check(words, FieldType::Text, &["\"a\"", "null", "\"a\""], &[]);
    let list = ListArray::from_iter_primitive::<Int64Type, _, _>([Some(vec![Some(1), None])]);
    check(list.clone(), FieldType::Float8Array, &["[1,null]"], &[]);
    check(list, FieldType::Jsonb, &["[1,null]"], &[]);
    check(
        StringArray::from(vec!["äääääääää", "x"]),
        FieldType::Text,
        &["\"äääää\"", "\"x\""],
        &["0: string of 18 bytes was cut to 10 bytes"],
    );
    check(
        StringArray::from(vec!["12", "x", ""]),
        FieldType::Float8,
        &["12", "null", "null"],
        &[
            "1: text is not a value of type double precision",
            "2: text is not a value of type double precision",
        ],
    );
}

#[test]
fn cells_without_a_type() {
    check_text(
        &[Some("1.50"), Some(""), None, Some("x")],
        FieldType::Float8,
        &["1.5", "null", "null", "null"],
        &["3: text is not a value of type double precision"],
    );
    check_text(
        &[Some(""), Some("x")],
        FieldType::Text,
        &["\"\"", "\"x\""],
        &[],
    );
    check_text(
        &[Some("[1,2]"), Some("3"), Some("[x")],
        FieldType::Float8Array,
        &["[1,2]", "[3]", "null"],
        &["2: text is not a value of type double precision"],
    );
    check_text(
        &[Some("{\"a\": 1}"), Some("x"), Some("1")],
        FieldType::Jsonb,
        &["{\"a\":1}", "\"x\"", "1"],
        &[],
    );
    check_text(
        &[Some("2024-05-17 10:00:00+02")],
        FieldType::Timestamptz,
        &["\"2024-05-17T08:00:00+00:00\""],
        &[],
    );
    check_text(
        &[Some("t"), Some("f"), Some("true"), Some("yes")],
        FieldType::Bool,
        &["true", "false", "true", "null"],
        &["3: a string is not a value of type boolean"],
    );
    check_text(
        &[Some("+5"), Some("1e2")],
        FieldType::Int8,
        &["5", "100"],
        &[],
    );
}

#[test]
fn arrays_as_postgres_prints_them() {
    let text = FieldType::TextArray;
    check_text(
        &[
            Some(r#"{a,NULL,"","NULL"}"#),
            Some("{}"),
            Some(r#"{"say \"x\"","b,c","\\"}"#),
            Some(" { a b , null } "),
            Some(r#"["x"]"#),
        ],
        text,
        &[
            r#"["a",null,"","NULL"]"#,
            "[]",
            r#"["say \"x\"","b,c","\\"]"#,
            r#"["a b",null]"#,
            r#"["x"]"#,
        ],
        &[],
    );
    check_text(
        &[Some("{t,NULL,f}")],
        FieldType::BoolArray,
        &["[true,null,false]"],
        &[],
    );
    check_text(
        &[Some("{1.5,NULL,-2e+30}")],
        FieldType::Float8Array,
        &["[1.5,null,-2e30]"],
        &[],
    );
    // None of them, and what no field of lists holds, is what it was.
    for other in ["{a", "{a}b", "{{1},{2}}", "{,}", "{\"a}", "{a\"b\"}"] {
        let (values, _) = shown(Arc::new(StringArray::from(vec![other])), text, true);
        let mut whole = String::new();
        json::write_string(other, &mut whole);
        assert_eq!(values, [format!("[{whole}]")], "{other}");
    }
}

#[test]
fn text_that_is_json() {
    let text = |cell: &str| Arc::new(StringArray::from(vec![cell])) as ArrayRef;
    let object = "{\"a\":[1]}";
    for (cell, untyped, expected) in [
        (object, false, object),
        (object, true, object),
        ("[1]", false, "[1]"),
        ("1", false, "\"1\""),
        ("1", true, "1"),
        ("{a}", false, "\"{a}\""),
    ] {
        let (values, notes) = shown(text(cell), FieldType::Jsonb, untyped);
        assert_eq!(
            (values, notes),
            (vec![expected.to_owned()], vec![]),
            "{cell}"
        );
    }
}

#[test]
fn types_on_first_sight() {
    for (cells, expected) in [
        (&["1", "2.5", "-3e2"][..], Some(FieldType::Float8)),
        (&["1", "9007199254740993"], Some(FieldType::Int8)),
        (&["1.5", "9007199254740993"], Some(FieldType::Float8)),
        (&["1", "x"], Some(FieldType::Text)),
        (&["007", "12"], Some(FieldType::Text)),
        (&["0", "0.5", "-0.5"], Some(FieldType::Float8)),
        (&["+49"], Some(FieldType::Text)),
        (&["true", "false"], Some(FieldType::Bool)),
        (&["true", "1"], Some(FieldType::Text)),
        (&["2024-05-17", "2024-05-18"], Some(FieldType::Date)),
        (
            &["2024-05-17", "2024-05-18T10:00Z"],
            Some(FieldType::Timestamptz),
        ),
        (&["2024-02-30"], Some(FieldType::Text)),
        (&[""], Some(FieldType::Text)),
        (&[], None),
        (&["12345678901234567890"], Some(FieldType::Text)),
    ] {
        assert_eq!(
            infer(&StringArray::from(cells.to_vec())),
            expected,
            "{cells:?}"
        );
    }
    assert_eq!(infer(&StringArray::from(vec![None::<&str>, None])), None);
}

fn seen(array: &ArrayRef) -> Vec<(usize, Option<i64>)> {
    let mut seen = Vec::new();
    times(array, |row, time| seen.push((row, time)));
    seen
}

#[test]
fn times_of_events() {
    let text = StringArray::from(vec![
        Some("2024-05-17T08:00:00Z"),
        Some("1715932800000"),
        Some("soon"),
        None,
        Some(""),
    ]);
    let us = 1_715_932_800_000_000;
    assert_eq!(
        seen(&(Arc::new(text) as ArrayRef)),
        [(0, Some(us)), (1, Some(us)), (2, None)]
    );
    let ms = Arc::new(Int64Array::from(vec![1_715_932_800_000])) as ArrayRef;
    assert_eq!(seen(&ms), [(0, Some(us))]);
}

/// A column at once is what its cells are one by one, as beside one that needs a look.
#[test]
fn common_cells_are_the_same_at_once_and_alone() {
    let cells = [
        (
            FieldType::Float8,
            vec!["0", "-0", "12.50", "-3", "999999999999999", ""],
        ),
        (FieldType::Int8, vec!["0", "-7", "9223372036854775807", ""]),
        (FieldType::Int4, vec!["2147483647", "-2147483648", ""]),
        (FieldType::Date, vec!["2024-02-29", "0001-01-01", ""]),
        (
            FieldType::Timestamptz,
            vec!["2024-05-17 08:00:00.25+02", "2024-05-17", ""],
        ),
    ];
    for (ty, cells) in cells {
        let whole = StringArray::from_iter(cells.iter().map(|c| Some(*c)).chain([None]));
        let odd = StringArray::from_iter(whole.iter().chain([Some("odd")]));
        let (at_once, none) = shown(Arc::new(whole.clone()), ty, true);
        let (alone, notes) = shown(Arc::new(odd), ty, true);
        assert_eq!(at_once, alone[..whole.len()], "as {ty}");
        assert_eq!((none.len(), notes.len()), (0, 1));
        assert_eq!(at_once[cells.len() - 1..], ["null", "null"]);
        // Without a type of their own empty texts are nothing; with one they are no numbers.
        assert_eq!(shown(Arc::new(whole), ty, false).1.len(), 1);
    }
}
