//! Small helpers over Postgres' nodes, lists and tuple descriptors.

use std::ffi::{CStr, CString};

use pgrx::{PgList, pg_sys};

use super::columns::Column;

/// The tag of a node.
///
/// # Safety
/// `node` points to a node.
pub unsafe fn tag(node: *const pg_sys::Node) -> pg_sys::NodeTag {
    // SAFETY: every node begins with its tag.
    unsafe { (*node).type_ }
}

/// The pointers of a list.
///
/// # Safety
/// `list` is NIL or a list of pointers to `T`.
pub unsafe fn pointers<T>(list: *mut pg_sys::List) -> Vec<*mut T> {
    // SAFETY: as promised by the caller.
    let list = unsafe { PgList::<T>::from_pg(list) };
    list.iter_ptr().collect()
}

/// A copy of a NUL-terminated text; empty for a null pointer.
///
/// # Safety
/// `chars` is null or points to NUL-terminated bytes.
pub unsafe fn text(chars: *const std::ffi::c_char) -> String {
    if chars.is_null() {
        return String::new();
    }
    // SAFETY: as promised by the caller.
    unsafe { CStr::from_ptr(chars) }
        .to_string_lossy()
        .into_owned()
}

/// A list of one String node, the form in which a plan carries text.
pub fn string_list(value: &str) -> *mut pg_sys::List {
    let value = CString::new(value).unwrap_or_default();
    // SAFETY: the text is copied into the current memory context, where the list is made too.
    unsafe {
        let node = pg_sys::makeString(pg_sys::pstrdup(value.as_ptr()));
        pg_sys::lappend(std::ptr::null_mut(), node.cast())
    }
}

/// The text of [`string_list`].
///
/// # Safety
/// `list` was made by [`string_list`], or is a copy of such a list.
pub unsafe fn list_string(list: *mut pg_sys::List) -> String {
    // SAFETY: the list has one String node.
    unsafe {
        match pointers::<pg_sys::String>(list).first() {
            Some(node) => text((**node).sval),
            None => String::new(),
        }
    }
}

/// The live columns of a relation.
///
/// # Safety
/// `desc` is a valid tuple descriptor.
pub unsafe fn columns(desc: pg_sys::TupleDesc) -> Vec<Column> {
    // SAFETY: attribute numbers run from 0 to natts.
    unsafe {
        (0..(*desc).natts as usize)
            .map(|i| attribute(desc, i))
            .filter(|attribute| !(**attribute).attisdropped)
            .map(|attribute| Column {
                attnum: (*attribute).attnum,
                name: text((*attribute).attname.data.as_ptr()),
                type_oid: (*attribute).atttypid,
                typmod: (*attribute).atttypmod,
            })
            .collect()
    }
}

#[cfg(not(feature = "pg18"))]
unsafe fn attribute(desc: pg_sys::TupleDesc, i: usize) -> *const pg_sys::FormData_pg_attribute {
    // SAFETY: the caller keeps i below natts.
    unsafe { (*desc).attrs.as_ptr().add(i) }
}

#[cfg(feature = "pg18")]
unsafe fn attribute(desc: pg_sys::TupleDesc, i: usize) -> *const pg_sys::FormData_pg_attribute {
    // SAFETY: the caller keeps i below natts.
    unsafe { pg_sys::TupleDescAttr(desc, i as i32) }
}

/// The text form of a datum.
///
/// # Safety
/// The datum is of this type and not NULL.
pub unsafe fn output(datum: pg_sys::Datum, type_oid: pg_sys::Oid) -> String {
    let (mut function, mut is_varlena) = (pg_sys::InvalidOid, false);
    // SAFETY: the output function of the datum's own type gives NUL-terminated text.
    unsafe {
        pg_sys::getTypeOutputInfo(type_oid, &mut function, &mut is_varlena);
        let chars = pg_sys::OidOutputFunctionCall(function, datum);
        let out = text(chars);
        pg_sys::pfree(chars.cast());
        out
    }
}
