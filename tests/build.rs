//! The consistency suite has its own `getrandom`, so that its simulations can be repeated. Libraries
//! look that function up by its name at run time, and must find it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-tests=-Wl,--export-dynamic-symbol=getrandom");
}
