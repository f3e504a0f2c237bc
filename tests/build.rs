//! The consistency suite has its own `getrandom` and `clock_gettime`, so that its simulations can be
//! repeated. Libraries look these functions up by their names at run time, and must find them.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for function in ["getrandom", "clock_gettime"] {
        println!("cargo::rustc-link-arg-tests=-Wl,--export-dynamic-symbol={function}");
    }
}
