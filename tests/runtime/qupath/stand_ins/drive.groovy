// drive.groovy SCRIPT JSON: runs SCRIPT with the images of JSON, and prints the images as JSON in the last line.
// {"project": bool, "open": number of the open image or null, "images": [{"uri", "width", "height", "um" or null}], "runs"}
import groovy.json.JsonOutput
import groovy.json.JsonSlurper
import qupath.lib.images.ImageData
import qupath.lib.images.servers.ImageServer
import qupath.lib.projects.Project
import qupath.lib.scripting.QP

def wanted = new JsonSlurper().parseText(args[1])
def images = wanted.images.collect {
    new ImageData(server: new ImageServer(uri: new URI(it.uri), width: it.width, height: it.height, um: it.um == null ? Double.NaN : it.um))
}
QP.opened = wanted.open == null ? null : images[wanted.open]
if (wanted.project) {
    QP.project = new Project()
    images.each {
        def entry = QP.project.addImage(null)
        entry.data = it
        entry.setImageName(it.server.metadata.name)
    }
}
wanted.runs.times {
    new GroovyShell(QP.classLoader, new Binding()).evaluate(new File(args[0]))
}
def entries = QP.project == null ? [] : QP.project.imageList
println JsonOutput.toJson([
    images: images.collect { image ->
        def objects = image.hierarchy.getAllObjects(false)
        [
            um: Double.isNaN(image.server.um) ? null : image.server.um,
            closed: image.server.closed,
            objects: objects.collect { [it.feature.properties.objectType, it.feature.geometry.coordinates[0][0], it.shift, it.locked, it.metadata.HistoStream] },
        ]
    },
    saved: entries.findAll { it.data }.collect { it.saved },
    added: entries.findAll { !it.data }.collect { [it.imageName, it.builder] },
])
