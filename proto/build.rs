//! Compiles the .proto files with protox, so no system protoc is needed, and lists their methods.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files =
        ["config", "raft", "membership", "node", "vm", "ha", "task", "storage", "vm_process"]
            .map(|name| format!("proto/holdfast/v1/{name}.proto"));
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, ["proto"])?;
    let mut methods = String::from("&[\n");
    for service in descriptors.file.iter().flat_map(|file| &file.service) {
        for method in &service.method {
            let streams = method.client_streaming() || method.server_streaming();
            let (service, name) = (service.name(), method.name());
            methods += &format!(
                "    Method {{ service: {service:?}, name: {name:?}, streams: {streams} }},\n"
            );
        }
    }
    methods += "]\n";
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("methods.rs"), methods)?;
    tonic_prost_build::configure()
        .type_attribute(".", "#[derive(serde::Serialize, serde::Deserialize)]")
        .compile_fds(descriptors)?;
    Ok(())
}
